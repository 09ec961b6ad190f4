"""Backpropagation: the next block sends back the gradient at a block's output.

::

    F   block 0 --y--> block 1 --y--> block 2 -> loss
    B   block 0 <-dx-- block 1 <-dx-- block 2

Invariant: with any number of blocks the gradients are those of the whole model in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.base import (
    GRADIENT,
    ExecutionMode,
    Objective,
    backward_routes,
    forward_routes,
    loss_pair,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.actions import Route
from dtrain.tasks.task import Task


@dataclass(frozen=True)
class Backprop(Objective):
    """Pipelined backpropagation; its staleness is 0 under every synchronous schedule."""

    default_schedule: ClassVar[str] = "1f1b"
    sends_gradients_back: ClassVar[bool] = True
    takes_complex_outputs: ClassVar[bool] = True

    def serves(self, task: Task) -> None:
        """Return None: every differentiable loss is served."""

    def takes_sample_weights(self) -> bool:
        """Return True."""
        return True

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send activations forward, and in training gradients (rows, ...) back."""
        backward = backward_routes(blocks) if mode == "train" else ()
        return (*forward_routes(blocks), *backward)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Return the loss in the last block, elsewhere the output with its received gradient."""
        return (
            [loss_pair(micro_batch, micro_batch.y)]
            if spec.is_last
            else [(micro_batch.y, micro_batch.received[GRADIENT])]
        )
