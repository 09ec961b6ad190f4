"""Backpropagation: each block is pulled by the gradient that the next block sends back.

Invariant: with any number of blocks the gradients are those of the whole net in one process.

::

    F   block 0 --y--> block 1 --y--> block 2 -> loss
    B   block 0 <-dx-- block 1 <-dx-- block 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dtrain.block import Block, Pull
from dtrain.live import Live
from dtrain.objectives.objective import GRADIENT, Mode, Objective, born, onward
from dtrain.objectives.task import Task
from dtrain.schedules.action import Point, Route


@dataclass(frozen=True)
class Backprop(Objective):
    """The global gradient, pipelined: staleness 0 under every synchronous schedule."""

    schedule: ClassVar[str] = "1f1b"

    def routes(self, blocks: int, mode: Mode) -> tuple[Route, ...]:
        """Activations go on; in training gradients (rows, ...) come back."""
        if mode == "predict":
            return onward(blocks)
        back = (Route(Point(b + 1, "B"), Point(b, "B"), GRADIENT) for b in range(blocks - 1))
        return (*onward(blocks), *back)

    def pulls(self, task: Task, block: Block, live: Live) -> list[Pull]:
        """Pull the loss in the last block, the output along what was told in the others."""
        return [born(live, live.y)] if task.last else [(live.y, live.told[GRADIENT])]
