"""CCL, counter-current learning: a feedback network sends codes of the classes backwards.

Kao and Hariharan 2024, arXiv 2409.19841 (classification). With a_k the flat output of block k
(rows, d_k) and sg a detached tensor, the feedback layer V_k (d_k, d_{k+1}) computes one code per
class, c_k = psi(V_k sg(c_{k+1})). Both learn the mean squared error of a_k c_k^T to one-hot::

    forward   x --> block 0 --a_0--> block 1 --a_1--> block 2 (own head)   cross-entropy
    codes         V_0 c_1  <--c_1--  V_1 c_2          c_2 = one-hot codes, known, so not sent

Codes are C x d_k numbers, once per update, whatever the batch size. A block computes them after its
update; the previous block uses them in the next update, or `lag` updates later. Received codes are
kept in a buffer, so the next segment starts with the last ones. The buffer starts with zeros, from
which nothing is learnt: the learning signal of block k of K is zero in the first
``lag * (K - 2 - k) + 1`` updates, that of the last but one block never. One block is ordinary
backpropagation.

The reference code multiplies the *loss* by 256 * scale / d_k, not the scores (this matters to SGD;
its runs use a learning rate of 1). It masks samples by the prediction of the last block; earlier
blocks do not have it here, so `filter` uses the block's own score. It mirrors convolutions; here
images are averaged to `features` numbers. It trains a layer towards the input on which nothing
depends; here there is none.

Invariant: nothing of the feedback network enters the activations, so the exported model is the
trained one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, mse_loss, one_hot

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import (
    ExecutionMode,
    MessageSpec,
    Objective,
    backward_routes,
    forward_routes,
    loss_pair,
    scaled_loss_pair,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import pooling
from dtrain.objectives.common.field_checks import check_lag, check_scale
from dtrain.schedules.actions import Route

Psi = Literal["elu", "none"]


CODES = "codes"


REFERENCE_WIDTH = 256
"""Number of features for which the loss is `scale` times the squared error."""


@final
@dataclass(frozen=True)
class Ccl(Objective):
    """A feedback layer per earlier block. The last block of the forward network predicts.

    Parameters
    ----------
    lag : int
        Delay of codes in updates. With 2 no block waits under "stream"; with 0 each update has the
        codes of the one before it, under "drained".
    scale : float
        The loss is multiplied by 256 * scale / d_k.
    filter : float
        Samples whose own score differs from 1 by less are not learnt; 0 for none.
    psi : str
        Activation of a feedback layer: "elu" (the reference's) or "none".
    features : int
        Largest number of features of an image; flat outputs enter whole.

    Raises
    ------
    ConfigError
        `lag`, `scale`, `filter` or `features` is out of range.
    """

    lag: int = 2
    scale: float = 0.5
    filter: float = 0.0
    psi: Psi = "elu"
    features: int = 256

    def __post_init__(self) -> None:
        pooling.check_limit(self.features)
        check_lag(self.lag)
        check_scale(self.scale, default=0.5)
        if self.filter < 0:
            raise ConfigError(
                "objective.filter-negative",
                f"[objective] filter = {self.filter} must be at least 0",
            )

    @property
    def default_schedule(self) -> str:
        """Return "stream" if codes are late enough for it, else "drained"."""
        return "stream" if self.lag > 1 else "drained"

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the feedback layer of an earlier block; the last but one has its codes."""
        shape = block.classes, pooling.width(block.next_output_shape, self.features)
        codes = torch.eye(*shape) if block.index == block.blocks - 2 else torch.zeros(shape)
        return FeedbackLayer(codes, block.output_shape, self.features, self.psi)

    def head_input_shape(self, spec: BlockSpec) -> None:
        """Return None: the feedback layer runs on classes, once per micro-batch."""

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward; in training codes back, except from the last block."""
        codes = backward_routes(blocks - 1, CODES, "U", self.lag) if mode == "train" else ()
        return (*forward_routes(blocks), *reversed(codes))

    def message_spec(self, route: Route, specs: Sequence[BlockSpec], rows: int) -> MessageSpec:
        """Return (classes, d_{k+1}) for codes."""
        if route.name != CODES:
            return super().message_spec(route, specs, rows)
        source = specs[route.source.block]
        width = pooling.width(source.output_shape, self.features)
        return (source.classes, width), source.dtype

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the codes with which the block learns next."""
        if route.name != CODES:
            return super().make_message(route, block, micro_batch)
        assert isinstance(block.head, FeedbackLayer)
        return block.head.make_codes().detach()

    def after_update(self, spec: BlockSpec, block: Block, received: Mapping[str, Tensor]) -> None:
        """Keep the received codes."""
        if CODES in received:
            assert isinstance(block.head, FeedbackLayer)
            block.head.codes.copy_(received[CODES])

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the squared error of the scores against the codes, from which layers and feedback
        layer learn; in the last block the loss."""
        if block.head is None:
            return [loss_pair(micro_batch, micro_batch.y)]
        scores, labels = block.head(micro_batch.y), one_hot(micro_batch.targets, spec.classes)
        if self.filter:
            gap = (scores.detach() - labels).abs().mul(labels).sum(1, keepdim=True)
            scores = scores * (gap >= self.filter)
        width_factor = REFERENCE_WIDTH / pooling.width(spec.output_shape, self.features)
        loss = self.scale * width_factor * mse_loss(scores, labels.to(scores.dtype))
        return [scaled_loss_pair(micro_batch, loss)]

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the scores (rows, classes) against the codes, in the last block the model's."""
        return micro_batch.y if block.head is None else block.head(micro_batch.y)


@final
class FeedbackLayer(nn.Module):
    """A feedback layer (d_k, d_{k+1}), and the last received codes (classes, d_{k+1}).

    ::

        codes of the next block (classes, d_{k+1}) -- V -- psi --> own codes (classes, d_k)
        output of the block (rows, ...) ------ flat (rows, d_k) ------ x ---> scores (rows, classes)

    Invariant: it learns from its own codes alone; those of the next block are a buffer without a
    graph.
    """

    uses_rng = False
    codes: Tensor

    def __init__(
        self, codes: Tensor, output_shape: tuple[int, ...], features: int, psi: Psi
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(codes.shape[1], pooling.width(output_shape, features), bias=False)
        self.flat, self.psi = pooling.make_pool(output_shape, features), psi
        self.register_buffer("codes", codes)

    def forward(self, y: Tensor) -> Tensor:
        """Return the scores (rows, classes) of a block's output (rows, ...)."""
        scores: Tensor = self.flat(y) @ self.make_codes().T
        return scores

    def make_codes(self) -> Tensor:
        """Return the block's own codes (classes, d_k)."""
        # Copied, since codes may arrive while a graph that uses them is still needed.
        codes: Tensor = self.layer(self.codes.clone())
        return elu(codes) if self.psi == "elu" else codes
