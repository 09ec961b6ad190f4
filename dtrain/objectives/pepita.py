"""PEPITA: a second forward pass, of the input that the error has modulated, in place of a backward.

Dellaferrera and Kreiman, "Error-driven Input Modulation: Solving the Credit Assignment Problem
without a Backward Pass", ICML 2022, arXiv 2201.11665. With e = softmax(out) - onehot, F (C, d_0)
fixed and random, h_k what leaves block k in the first pass and h'_k in the second::

    F     x  --> block 0 --h_0--> block 1 --h_1--> block 2 --> out  ->  e
             .------------------------ e -------------------------------'
    F/1   x' = x + e F --> block 0 --h'_0--> block 1 --h'_1--> block 2 --> out'
    B                   h_0 - h'_0        h_1 - h'_1           e at out'

With one layer as a block this is the paper's dW_k = (h_k - h'_k) h'_{k-1}^T, dW_L = e h'_{L-1}^T,
without the slope of the activation: the force h_k - h'_k is put on the *pre-activation* of the
block's last layer where that can be tapped (a module `sums`, which layers of `mlp` have), else on
its output. Below that a block backpropagates its own force; the last one's is e on the scores, and
what lies below the head learns from it as by the true loss, not from h - h'. One block makes one
pass and is ordinary backpropagation. The loss that is shown is that of the first pass.

To first order h_k - h'_k = -phi' * (W F e) in the first layer: an adaptive feedback alignment.

The authors' code has the *last* layer learn from the error of the second pass (`error` = "second";
the default is the paper's) and F He-uniform times 0.05 (`scale`). Dropout masks are alike in both
passes, there and here. Batch statistics see both passes, modulated inputs too.

The error has to be back before the second pass begins ("drained"). "pipelined" runs it without a
wait, but do not train so: h_k and h'_k are then made by weights that are K updates apart, the force
undoes what those updates changed, and digits stay near chance.

Invariant: no gradient crosses a block's border; the first pass leaves no graph behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.base import ExecutionMode, Objective, forward_routes, scaled_loss_pair
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.random_feedback import FixedMatrix
from dtrain.schedules.actions import Point, Route

ERROR, USUAL_BLOCKS = "error", 3


@final
@dataclass(frozen=True)
class Pepita(Objective):
    """A fixed matrix at the input; prediction: the last block's.

    Parameters
    ----------
    scale : float
        What the matrix, uniform within sqrt(6 / d_0), is multiplied by.
    error : str
        Which pass's error the last block learns from: "first" or "second".
    """

    default_schedule: ClassVar[str] = "drained"

    scale: float = 0.05
    error: Literal["first", "second"] = "first"

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ConfigError(
                "todo.key", f"[objective] scale = {self.scale}: give more than 0 (default 0.05)"
            )

    def build_head(self, spec: BlockSpec) -> nn.Module | None:
        """Return the matrix at the first of several blocks."""
        first, width = spec.index == 0 and spec.blocks > 1, math.prod(spec.sample_shape)
        return FixedMatrix("kaiming", spec.classes, width) if first else None

    def head_input_shape(self, spec: BlockSpec) -> None:
        """Nothing is run: errors are multiplied by a matrix."""

    def forward_passes(self, spec: BlockSpec) -> int:
        """Return 2 passes; the costs count both as learnt."""
        return 2 if spec.blocks > 1 else 1

    def taps(self, block: Block) -> Sequence[str]:
        """Return the pre-activation of the block's last layer, where it can be tapped."""
        name, layer = list(block.layers.items())[-1]
        return [f"{name}.sums"] if isinstance(getattr(layer, "sums", None), nn.Module) else []

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Activations go on, in training twice; between the passes the error goes to the input."""
        if mode == "predict" or blocks == 1:
            return forward_routes(blocks)
        back = Route(Point(blocks - 1, "F"), Point(0, "F", 1), ERROR)
        return (*forward_routes(blocks), *forward_routes(blocks, pass_=1), back)

    def message_spec(
        self, route: Route, specs: Sequence[BlockSpec], rows: int
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return (rows, classes) for the error."""
        wide = (rows, specs[-1].classes), specs[-1].dtype
        return wide if route.name == ERROR else super().message_spec(route, specs, rows)

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Give the error of each sample's own loss."""
        assert micro_batch is not None
        return (
            output_error(micro_batch)
            if route.name == ERROR
            else super().make_message(route, block, micro_batch)
        )

    def needs_graph(self, spec: BlockSpec, pass_: int) -> bool:
        """The second pass is learnt; the first is the only one where one block learns alone."""
        return pass_ == 1 or spec.blocks == 1

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return what arrived, or the data; in the second pass modulated."""
        x = super().make_input(spec, block, micro_batch)
        if ERROR not in micro_batch.received:
            return x
        assert isinstance(block.head, FixedMatrix)
        matrix = self.scale * block.head.feedback
        added = micro_batch.received[ERROR].to(matrix.dtype) @ matrix
        return x + added.view_as(x).to(x.dtype)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the second pass back to where the first was; the last block along the error."""
        first = micro_batch.previous_pass
        if first is None:
            return [scaled_loss_pair(micro_batch, micro_batch.y)]
        share = micro_batch.loss_scale / len(micro_batch.targets)
        if spec.is_last:
            micro_batch.loss = cross_entropy(first.y, micro_batch.targets)
            return [
                (
                    micro_batch.y,
                    share * output_error(first if self.error == "first" else micro_batch),
                )
            ]
        end = next((micro_batch.taps[name] for name in self.taps(block)), micro_batch.y)
        return [(end, share * (first.y - micro_batch.y.detach()))]

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Say that it is for few blocks."""
        if len(specs) <= USUAL_BLOCKS:
            return []
        return [
            f"'pepita' modulates the input alone, and its effect fades with depth: {len(specs)} "
            f"blocks, while 2 or {USUAL_BLOCKS} layers are usual; set [partition] blocks = {USUAL_BLOCKS}"
        ]


def output_error(micro_batch: MicroBatch) -> Tensor:
    """Return softmax(y) - onehot (rows, classes)."""
    return micro_batch.y.detach().softmax(1) - one_hot(micro_batch.targets, micro_batch.y.shape[1])
