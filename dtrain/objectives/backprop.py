"""Backpropagation: each block is pulled by the gradient that the next block sends back.

Invariant: with any number of blocks the gradients are those of the whole net in one process.

::

    F   block 0 --y--> block 1 --y--> block 2 -> loss
    B   block 0 <-dx-- block 1 <-dx-- block 2
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
    forward_routes,
    scaled_loss_pair,
)
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules.actions import Point, Route


@dataclass(frozen=True)
class Backprop(Objective):
    """The global gradient, pipelined: staleness 0 under every synchronous schedule."""

    default_schedule: ClassVar[str] = "1f1b"

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Activations go on; in training gradients (rows, ...) come back."""
        if mode == "predict":
            return forward_routes(blocks)
        back = (Route(Point(b + 1, "B"), Point(b, "B"), GRADIENT) for b in range(blocks - 1))
        return (*forward_routes(blocks), *back)

    def backward_pairs(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch
    ) -> list[BackwardPair]:
        """Pull the loss in the last block, the output along what was told in the others."""
        return (
            [scaled_loss_pair(micro_batch, micro_batch.y)]
            if spec.is_last
            else [(micro_batch.y, micro_batch.received[GRADIENT])]
        )
