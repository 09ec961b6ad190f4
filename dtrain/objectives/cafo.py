"""CaFo, cascaded forward: every block's output is read by a linear head; blocks may stay random.

Zhao et al., "The cascaded forward algorithm for neural network training", arXiv 2303.09728. With h
the features of a sample, y its one-hot label and W_k the head of block k::

    x --> block 0 --h--> block 1 --h--> block 2
             |              |              |
            W_0            W_1       W_2, own head
             '--- sum of softmax(W_k h) ---'-----> class

    "least-squares"       W = (sum h h^T)^-1 sum h y^T, at a segment's end
    "ce", "sparsemax"     W learns that loss by the run's optimizer; the latter votes by sparsemax

"random" blocks keep their first weights: nothing runs backward. "trained" ones learn from the loss
of their own head (of least squares: by the W of the segment before). The paper's trained form is
said to use direct feedback alignment; the authors' code has none. It has no bias in its heads
either, descends over the whole training split from weights of 1, and takes up to 8192 features as
they are (set `features`). The last linear map of the model's own head is solved, or learns, too.

Sums grow over the epochs while blocks are random: the same equations, or more views of the samples
where they are augmented. Trained blocks move, so sums start anew once they hold an epoch; a run
that ends inside an epoch is solved from that part of it. Before a solution heads are as drawn.

Invariant: with random blocks nothing but heads moves, batch statistics apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import pooling
from dtrain.objectives.common.aux_heads import AuxHead
from dtrain.objectives.common.least_squares import (
    Readout,
    head_features,
    last_linear,
    mean_squared_error,
    model_head_linear,
    tap_head_input,
    width_warnings,
)


def sparsemax(scores: Tensor) -> Tensor:
    """Return the probabilities (rows, classes) nearest to `scores` (algorithm 1)."""
    ordered = scores.sort(dim=1, descending=True).values
    counts = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype, device=scores.device)
    taus = (ordered.cumsum(1) - 1) / counts
    size = (ordered > taus).sum(1, keepdim=True)  # those are the first ones
    return (scores - taus.gather(1, size - 1)).clamp(min=0)


def sparsemax_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of `scores` (rows, classes) for labels (rows,).

    It is the largest value of <p, z> - |p|^2 / 2 over all p, so p need not be differentiated.
    """
    p = sparsemax(scores.detach())
    right = scores.gather(1, targets[:, None])[:, 0]
    return ((p * scores).sum(1) - p.square().sum(1) / 2 + 0.5 - right).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "least-squares": mean_squared_error,
    "ce": cross_entropy,
    "sparsemax": sparsemax_loss,
}


@final
@dataclass(frozen=True)
class Cafo(AuxHead):
    """A linear head per block, and the vote of all.

    Parameters
    ----------
    head : str
        "least-squares", "ce" or "sparsemax".
    blocks : str
        "random" or "trained".
    features : int
        The most numbers of an image that enter a head; flat outputs enter whole.
    """

    accumulated_buffers: ClassVar[tuple[str, ...]] = ("gram", "cross")
    head: Literal["least-squares", "ce", "sparsemax"] = "least-squares"
    blocks: Literal["random", "trained"] = "random"
    features: int = 2048

    def __post_init__(self) -> None:
        pooling.check_limit(self.features)

    @property
    def closed_form(self) -> bool:
        """Whether heads are solved in closed form."""
        return self.head == "least-squares"

    @property
    def needs_downstream_layers(self) -> bool:
        """Whether it looks at the layer that is the model's head: its sums are as wide."""
        return self.closed_form

    @property
    def trains_layers(self) -> bool:
        """Whether the layers learn; if not they keep their first weights, the head apart."""
        return self.blocks == "trained"

    @property
    def predicts_by_vote(self) -> bool:
        """The prediction is that of all blocks."""
        return True

    def frozen_modules(
        self, spec: BlockSpec, layers: Mapping[str, nn.Module]
    ) -> Iterable[nn.Module]:
        """All layers that are random, but not a head that learns; a head that is solved."""
        *below, last = layers.values()
        random = [] if self.trains_layers else below if spec.is_last else [*below, last]
        return [*random, last_linear(last)] if spec.is_last and self.closed_form else random

    def width(self, spec: BlockSpec) -> int:
        """Return how many features of a sample enter the head."""
        own = spec.is_last and self.closed_form
        return (
            model_head_linear(spec).in_features
            if own
            else pooling.width(spec.output_shape, self.features)
        )

    def head_network(self, spec: BlockSpec) -> Readout:
        """Return the head of an earlier block; in the last one the sums for the model's own."""
        pool = (
            nn.Identity() if spec.is_last else pooling.make_pool(spec.output_shape, self.features)
        )
        return Readout(
            pool, self.width(spec), spec.classes, self.closed_form, with_linear=not spec.is_last
        )

    def build_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return the head, none where the model's own learns."""
        return self.head_network(spec) if self.closed_form or not spec.is_last else None

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...] | None:
        """Return the shape of the output, in the last block that of the features."""
        return (self.width(spec),) if spec.is_last else spec.output_shape

    def taps(self, block: Block) -> Sequence[str]:
        """Keep what enters the map that is solved in the last block."""
        tap_head_input(block)
        return ()

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Add the samples up, where heads are solved, and pull the loss of the head."""
        made = (
            None
            if block.head is None
            else block.head(head_features(block, micro_batch), micro_batch.targets)
        )
        loss = LOSSES[self.head](
            micro_batch.y if spec.is_last or made is None else made, micro_batch.targets
        )
        micro_batch.loss = loss.detach()
        return [(loss, torch.full_like(loss, micro_batch.loss_scale))]

    def solve(self, spec: BlockSpec, block: Block) -> None:
        """Solve the head from the sums, but the model's own where a user froze the last block."""
        if not self.closed_form or (spec.is_last and spec.frozen):
            return
        assert isinstance(block.head, Readout)
        *_, last = block.layers.values()
        block.head.solve(block.head.linear or last_linear(last))
        if self.trains_layers and block.head.sample_count >= spec.train_samples:
            block.head.reset_sums()

    def vote(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return probabilities (rows, classes)."""
        return sparsemax(scores) if self.head == "sparsemax" else scores.softmax(1)

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Tell what wide sums take, and of more features than samples."""
        widths = [self.width(task) for task in specs] if self.closed_form else []
        return width_warnings(widths, specs[0].train_samples)
