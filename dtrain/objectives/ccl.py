"""CCL, counter-current learning: a feedback net of its own, whose codes flow against the stream.

Kao and Hariharan 2024, arXiv 2409.19841 (classification). With a_k the flat output of block k
(rows, d_k) and sg a detached tensor, the feedback layer V_k (d_k, d_{k+1}) makes one code per
class, c_k = psi(V_k sg(c_{k+1})), and both learn the mean squared error of a_k c_k^T to one-hot::

    forward   x --> block 0 --a_0--> block 1 --a_1--> block 2 (own head)   cross-entropy
    codes         V_0 c_1  <--c_1--  V_1 c_2          c_2 = one-hot codes, known, so not sent

Codes are C x d_k numbers, once per update, whatever the batch is: a block makes them after it, and
the block below uses them in the next one, or `lag` updates later. They stand in a buffer, where the
next segment finds the last that came. It starts with zeros, which teach nothing: block k of K
stands still in the first ``lag * (K - 2 - k) + 1`` updates, but the one below the last in none.
One block is ordinary backpropagation.

The reference code multiplies the *loss* by 256 * scale / d_k, not the scores (this matters to SGD;
its runs use a rate of 1), masks by the prediction of the last block, which earlier ones do not have
here (`filter` looks at the block's own score), mirrors convolutions (here images are averaged to
`features` numbers), and trains a layer towards the input on which nothing depends (left out).

Invariant: nothing of the feedback net enters the stream, so the net that is exported is the net
that was trained.
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
from dtrain.objectives.base import ExecutionMode, Objective, forward_routes, scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import pooling
from dtrain.schedules.actions import Point, Route

CODES, REFERENCE_WIDTH = (
    "codes",
    256,
)  # the width at which the loss is `scale` times the squared error


@final
@dataclass(frozen=True)
class Ccl(Objective):
    """Anti-parallel streams; prediction: the forward net's last block.

    Parameters
    ----------
    lag : int
        Updates that codes come late. With 2 nobody waits for them; with 0 each update has those of
        the one before it, under "drained".
    scale : float
        The loss is multiplied by 256 * scale / d_k.
    filter : float
        Samples whose own score is nearer to 1 than that are not learnt; 0: all are.
    psi : str
        What follows a feedback layer: "elu" (the reference's) or "none".
    features : int
        The most numbers of an image that enter; flat outputs enter whole.
    """

    lag: int = 2
    scale: float = 0.5
    filter: float = 0.0
    psi: Psi = "elu"
    features: int = 256

    def __post_init__(self) -> None:
        pooling.check_limit(self.features)
        if min(self.lag, self.filter) < 0:
            found = f"lag = {self.lag}, filter = {self.filter}"
            raise ConfigError("todo.key", f"[objective] {found}: give at least 0 for both")
        if self.scale <= 0:
            raise ConfigError(
                "todo.key", f"[objective] scale = {self.scale}: give more than 0 (default 0.5)"
            )

    @property
    def default_schedule(self) -> str:
        """Stream where the codes come late enough for it."""
        return "stream" if self.lag > 1 else "drained"

    def build_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return the feedback layer of an earlier block; the one below the last has its codes."""
        if spec.is_last:
            return None
        shape = spec.classes, pooling.width(spec.next_output_shape, self.features)
        codes = torch.eye(*shape) if spec.index == spec.blocks - 2 else torch.zeros(shape)
        return FeedbackLayer(codes, spec.output_shape, self.features, self.psi)

    def head_input_shape(self, spec: BlockSpec) -> None:
        """The feedback layer sees classes, once per micro-batch, and no samples."""

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Activations go on; in training codes come back, but from the last block's."""
        down = reversed(range(blocks - 2)) if mode == "train" else ()
        back = (Route(Point(b + 1, "U"), Point(b, "U"), CODES, self.lag) for b in down)
        return (*forward_routes(blocks), *back)

    def message_spec(
        self, route: Route, specs: Sequence[BlockSpec], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return (classes, d_{k+1}) for codes."""
        above = specs[route.source.block]
        wide = (above.classes, pooling.width(above.output_shape, self.features)), above.dtype
        return wide if route.name == CODES else super().message_spec(route, specs, rows)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Give the codes that the block will learn with next."""
        if route.name != CODES:
            return super().make_message(route, block, micro_batch)
        assert isinstance(block.head, FeedbackLayer)
        return block.head.make_codes().detach()

    def after_update(self, spec: BlockSpec, block: Block, received: Mapping[str, Tensor]) -> None:
        """Keep the codes that have come."""
        if CODES in received:
            assert isinstance(block.head, FeedbackLayer)
            block.head.codes.copy_(received[CODES])

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the scores against the codes, which teaches the layers and the feedback layer."""
        if block.head is None:
            return [scaled_loss_pair(micro_batch, micro_batch.y)]
        scores, wanted = block.head(micro_batch.y), one_hot(micro_batch.targets, spec.classes)
        if self.filter:
            left = (scores.detach() - wanted).abs().mul(wanted).sum(1, keepdim=True)
            scores = scores * (left >= self.filter)
        units = REFERENCE_WIDTH / pooling.width(spec.output_shape, self.features)
        loss = self.scale * units * mse_loss(scores, wanted.to(scores.dtype))
        micro_batch.loss = loss.detach()
        return [(loss, torch.full_like(loss, micro_batch.loss_scale))]

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the scores against the class codes, in the last block the model's."""
        return micro_batch.y if block.head is None else block.head(micro_batch.y)


Psi = Literal["elu", "none"]


@final
class FeedbackLayer(nn.Module):
    """A feedback layer (d_k, d_{k+1}), and the codes (classes, d_{k+1}) that came last."""

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
        """Return the scores (rows, classes) of a block's output."""
        made: Tensor = self.flat(y) @ self.make_codes().T
        return made

    def make_codes(self) -> Tensor:
        """Return the block's own codes (classes, d_k)."""
        # What comes next must not change what is still to be learnt from.
        made: Tensor = self.layer(self.codes.clone())
        return elu(made) if self.psi == "elu" else made
