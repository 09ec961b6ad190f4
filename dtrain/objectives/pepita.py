"""PEPITA: a second forward pass, of an input modulated by the error, replaces the backward pass.

Dellaferrera and Kreiman, "Error-driven Input Modulation: Solving the Credit Assignment Problem
without a Backward Pass", ICML 2022, arXiv 2201.11665. With e = softmax(out) - onehot, F (C, d_0)
fixed and random, h_k the output of block k in the first pass and h'_k in the second::

    F     x  --> block 0 --h_0--> block 1 --h_1--> block 2 --> out  ->  e
             .------------------------ e -------------------------------'
    F/1   x' = x + e F --> block 0 --h'_0--> block 1 --h'_1--> block 2 --> out'
    B                   h_0 - h'_0        h_1 - h'_1           e at out'

With one layer as a block this is the paper's dW_k = (h_k - h'_k) h'_{k-1}^T, dW_L = e h'_{L-1}^T,
without the slope of the activation: the cotangent h_k - h'_k belongs to the *pre-activation* of the
block's last layer if that can be tapped (a module `sums`, which layers of `mlp` have), else to its
output. Inside a block this cotangent is backpropagated. The cotangent of the last block is e at the
scores, so its layers below the head learn from e as from the true loss, not from h - h'. One block
makes one pass and is ordinary backpropagation. The recorded loss is that of the first pass.

To first order h_k - h'_k = -phi' * (W F e) in the first layer: an adaptive feedback alignment.

In the authors' code the *last* layer learns from the error of the second pass (`error` = "second";
the default is the paper's), and F is He-uniform times 0.05 (`scale`). Dropout masks are equal in
both passes, there and here. Batch statistics include both passes, modulated inputs too.

The error must be back before the second pass begins ("drained"). "pipelined" runs without waiting,
but does not train: h_k and h'_k then depend on weights that are K updates apart, the cotangent
undoes what those updates changed, and accuracy on digits stays near chance.

Invariant: no gradient crosses the border of a block; the first pass leaves no graph behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor, nn

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import (
    ERROR,
    ExecutionMode,
    Objective,
    forward_routes,
    loss_pair,
    output_error,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.field_checks import check_scale
from dtrain.objectives.common.random_feedback import FixedMatrix
from dtrain.schedules.actions import Point, Route
from dtrain.tasks.task import Task

USUAL_BLOCKS = 3


@final
@dataclass(frozen=True)
class Pepita(Objective):
    """A fixed matrix at the input. The last block predicts; the others have no scores.

    Parameters
    ----------
    scale : float
        Factor of the matrix, which is uniform within sqrt(6 / d_0).
    error : str
        The pass whose error the last block learns from: "first" or "second".

    Raises
    ------
    ConfigError
        `scale` is not a finite number above 0.
    """

    default_schedule: ClassVar[str] = "drained"

    scale: float = 0.05
    error: Literal["first", "second"] = "first"

    def __post_init__(self) -> None:
        check_scale(self.scale, default=0.05)

    def serves(self, task: Task) -> None:
        """Return None: every differentiable loss is served."""

    def has_head(self, spec: BlockSpec) -> bool:
        """Whether it is the first of several blocks."""
        return spec.index == 0 and spec.blocks > 1

    def build_head(self, block: BlockSpec) -> nn.Module:
        """Return the matrix (outputs, numbers of a sample)."""
        return FixedMatrix("kaiming", block.scores_width, math.prod(block.sample_shape))

    def head_input_shape(self, spec: BlockSpec) -> None:
        """Return None: the head has no forward."""

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return 2; the costs count both as trained. One block makes 1 pass."""
        return 2 if spec.blocks > 1 else 1

    def taps(self, block: Block) -> Sequence[str]:
        """Tap the pre-activation of the block's last layer, if it has one as a module."""
        name, layer = list(block.layers.items())[-1]
        return [f"{name}.sums"] if isinstance(getattr(layer, "sums", None), nn.Module) else []

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward, in training twice; between the passes the error to block 0."""
        if mode == "predict" or blocks == 1:
            return forward_routes(blocks)
        error = Route(Point(blocks - 1, "F"), Point(0, "F", 1), ERROR)
        return (*forward_routes(blocks), *forward_routes(blocks, pass_=1), error)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the error (rows, outputs) of each sample's own loss, without the factor of the
        mean."""
        if route.name != ERROR:
            return super().make_message(route, block, micro_batch)
        assert micro_batch is not None
        return output_error(micro_batch).flatten(1)

    def needs_graph(self, spec: BlockSpec, pass_: int) -> bool:
        """Whether it is the second pass, or the only one of a single block."""
        return pass_ == 1 or spec.blocks == 1

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the activation or the samples; in the second pass of block 0 modulated by the
        error."""
        x = super().make_input(spec, block, micro_batch)
        if ERROR not in micro_batch.received:
            return x
        assert isinstance(block.head, FixedMatrix)
        matrix = self.scale * block.head.feedback
        modulation = micro_batch.received[ERROR].to(matrix.dtype) @ matrix
        return x + modulation.view_as(x).to(x.dtype)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the second pass's output with the cotangent h - h', in the last block with the
        error."""
        first = micro_batch.previous_pass
        if first is None:
            return [loss_pair(micro_batch, micro_batch.y)]
        scale = micro_batch.sample_scale
        if spec.is_last:
            micro_batch.loss = micro_batch.task.mean_loss(first.y, micro_batch.targets)
            error = output_error(first if self.error == "first" else micro_batch)
            return [(micro_batch.y, scale * error)]
        output = next((micro_batch.taps[name] for name in self.taps(block)), micro_batch.y)
        return [(output, scale * (first.y - micro_batch.y.detach()))]

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn of many blocks."""
        if len(specs) <= USUAL_BLOCKS:
            return []
        return [
            f"'pepita' modulates the input only, and the effect fades with depth: {len(specs)} "
            f"blocks, while 2 or {USUAL_BLOCKS} layers are usual; set [partition] blocks = "
            f"{USUAL_BLOCKS}"
        ]
