"""Closed forms: what blocks add up over a segment and solve at its end.

Invariant: each replica adds its own part from zero, and the sums of all are added to what was
before: the same bits however a run was cut into segments of replicas that share a sample order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from dtrain.block.block import Block
from dtrain.comm.groups import ProcessGroups
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec


@final
class ClosedFormSolver:
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
        block_specs: Sequence[BlockSpec],
        groups: ProcessGroups,
        last_stage: int,
    ) -> None:
        self.blocks, self.objective, self.block_specs = blocks, objective, block_specs
        self.groups, self.last_stage = groups, last_stage

    def _accumulated_buffers(self) -> list[Tensor]:
        """Return the buffers that add up over samples."""
        return [
            block.buffers[f"heads.{index}.{name}"]
            for index, block in self.blocks.items()
            for name in self.objective.accumulated_buffers
            if f"heads.{index}.{name}" in block.buffers
        ]

    def clear(self) -> list[Tensor]:
        """Return copies of all sums, and start them at zero: each replica adds its own part."""
        before = [each.clone() for each in self._accumulated_buffers()]
        for each in self._accumulated_buffers():
            each.zero_()
        return before

    def solve(self, previous_sums: Sequence[Tensor]) -> None:
        """Add the sums over the replicas to what was before, then solve. Collective."""
        if self.objective.accumulated_buffers:
            self.groups.replicas.mean_(self._accumulated_buffers(), weight=1.0)
        for total, old in zip(self._accumulated_buffers(), previous_sums, strict=True):
            total.add_(old)
        for index, block in self.blocks.items():
            self.objective.solve(self.block_specs[index], block)
        self._broadcast_buffers()

    def _broadcast_buffers(self) -> None:
        """Give all blocks what the last one has found out. Collective over the stages."""
        last, column = len(self.block_specs) - 1, self.groups.pipeline
        for name in self.objective.broadcast_buffers:
            keys = [(f"heads.{index}.{name}", block) for index, block in self.blocks.items()]
            own = [block.buffers[key] for key, block in keys if key in block.buffers]
            if not own:
                continue
            # Blocks are held in order, so the last stage's last is the last.
            kind = self.block_specs[last].dtype if own[-1].is_floating_point() else own[-1].dtype
            whole = own[-1].to(kind, copy=True)
            column.broadcast_([whole], self.last_stage)
            for each in own:
                each.copy_(whole)
