"""Closed forms: what blocks add up over a segment and solve at its end.

Invariant: each replica adds its own part from zero, and the sums of all are added to what was
before: the same bits however a run was cut into segments of replicas that share a sample order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from dtrain.block import Block
from dtrain.mail import Lines
from dtrain.objectives.objective import Objective
from dtrain.objectives.task import Task


@final
class Closed:
    """The sums of one rank's blocks.

    Parameters
    ----------
    last : int
        The stage of the last block.
    """

    def __init__(
        self,
        blocks: Mapping[int, Block],
        objective: Objective,
        tasks: Sequence[Task],
        lines: Lines,
        last: int,
    ) -> None:
        self.blocks, self.objective, self.tasks = blocks, objective, tasks
        self.lines, self.last = lines, last

    def _sums(self) -> list[Tensor]:
        """Return the buffers that add up over samples."""
        return [
            block.buffers[f"heads.{index}.{name}"]
            for index, block in self.blocks.items()
            for name in self.objective.sums
            if f"heads.{index}.{name}" in block.buffers
        ]

    def clear(self) -> list[Tensor]:
        """Return copies of all sums, and start them at zero: each replica adds its own part."""
        before = [each.clone() for each in self._sums()]
        for each in self._sums():
            each.zero_()
        return before

    def solve(self, before: Sequence[Tensor]) -> None:
        """Add the sums over the replicas to what was before, then solve. Collective."""
        if self.objective.sums:
            self.lines.replicas.mean_(self._sums(), weight=1.0)
        for total, old in zip(self._sums(), before, strict=True):
            total.add_(old)
        for index, block in self.blocks.items():
            self.objective.solve(self.tasks[index], block)
        self._spread()

    def _spread(self) -> None:
        """Give all blocks what the last one has found out. Collective over the stages."""
        last, column = len(self.tasks) - 1, self.lines.column
        for name in self.objective.spread:
            keys = [(f"heads.{index}.{name}", block) for index, block in self.blocks.items()]
            own = [block.buffers[key] for key, block in keys if key in block.buffers]
            if not own:
                continue
            # Blocks are held in order, so the last stage's last is the last.
            kind = self.tasks[last].dtype if own[-1].is_floating_point() else own[-1].dtype
            whole = own[-1].to(kind, copy=True)
            column.broadcast_([whole], self.last)
            for each in own:
                each.copy_(whole)
