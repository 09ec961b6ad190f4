"""ClosedFormSolver: statistics that heads accumulate in a segment, and the solve at its end.

Invariant: each replica accumulates from zero, and the sum over the replicas is added to the sum of
earlier segments. So cutting a run into other segments changes no bits, as long as the replicas get
the same samples.
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
    """The accumulated buffers of one rank's blocks.

    Parameters
    ----------
    last_stage : int
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
        self.blocks = blocks
        self.objective = objective
        self.block_specs = block_specs
        self.groups = groups
        self.last_stage = last_stage

    def clear(self) -> list[Tensor]:
        """Set all accumulated buffers to zero; return copies of their values."""
        buffers = self._head_buffers(*self.objective.accumulated_buffers)
        previous_sums = [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            buffer.zero_()
        return previous_sums

    def solve(self, previous_sums: Sequence[Tensor]) -> None:
        """Add the sums over the replicas to `previous_sums`, then solve every head.

        Collective over the replicas, and over the stages.
        """
        buffers = self._head_buffers(*self.objective.accumulated_buffers)
        if self.objective.accumulated_buffers:
            self.groups.replicas.mean_(buffers, weight=1.0)
        for buffer, previous in zip(buffers, previous_sums, strict=True):
            buffer.add_(previous)
        for index, block in self.blocks.items():
            self.objective.solve(self.block_specs[index], block)
        self._broadcast_buffers()

    def _broadcast_buffers(self) -> None:
        """Give the last block's broadcast buffers to all blocks. Collective over the stages."""
        output_dtype = self.block_specs[-1].dtype
        for name in self.objective.broadcast_buffers:
            buffers = self._head_buffers(name)
            if not buffers:
                continue
            last = buffers[-1]  # blocks are in order: on the last stage it is the last block's
            dtype = output_dtype if last.is_floating_point() else last.dtype
            message = last.to(dtype, copy=True)
            self.groups.pipeline.broadcast_([message], self.last_stage)
            for buffer in buffers:
                buffer.copy_(message)

    def _head_buffers(self, *names: str) -> list[Tensor]:
        """Return the buffers of these names in the heads, as far as they have them."""
        buffers = []
        for index, block in self.blocks.items():
            block_buffers = block.buffers
            keys = [f"heads.{index}.{name}" for name in names]
            buffers += [block_buffers[key] for key in keys if key in block_buffers]
        return buffers
