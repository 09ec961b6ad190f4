"""An update of one block: the learning rate, what replicas agree on, clipping, the step.

Invariant: with a clip over blocks nothing of one block depends on another; with a clip over the
model the norm is summed block by block in order, so that it is the same on any number of stages.

::

    last backward: means of the gradients that are complete begin
    rate -> means, sync.before_update -> clip -> step -> sync.after_update -> objective.after_update
                                          |                       |
                                          |                       in debug mode: equal replicas?
         over the model: squares of all blocks, told among the stages of the replica
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from dtrain.block import Block, Heard
from dtrain.comm.comm import Comm
from dtrain.course import Course
from dtrain.data.batches import Batch
from dtrain.early import Early, Group
from dtrain.optimizers import clip_, squares
from dtrain.replicas import compare
from dtrain.schedules.action import Action
from dtrain.syncs.sync import Clock, Sync
from dtrain.versions import Versions


class Updates:
    """Updates one rank's blocks.

    Parameters
    ----------
    column : Comm
        The stages of this replica.
    """

    def __init__(
        self,
        blocks: dict[int, Block],
        syncs: dict[int, Sync],
        versions: dict[int, Versions],
        course: Course,
        column: Comm,
    ) -> None:
        self.blocks, self.syncs, self.versions = blocks, syncs, versions
        self.course, self.column = course, column
        self.first = min(blocks)
        self.norm = 0.0
        self.means = {index: Early(block) for index, block in blocks.items()}
        self.learnt: Counter[int] = Counter()
        self.early = False

    def open(self, batches: Sequence[Batch]) -> None:
        """Prepare for a segment's updates.

        Means begin early only where all replicas then make the same calls in one order: a rank
        with several blocks goes through them by a plan, which follows from the shares.
        """
        same = len(self.blocks) == 1 or all(len(set(batch.shares)) == 1 for batch in batches)
        self.early = same and not self.course.schedule.splits

    def heard(self, action: Action, batch: Batch, update: int, epoch: int) -> Heard | None:
        """Return what to tell of gradients in a `B`, if it is the last before its block's `U`."""
        index = action.block
        self.learnt[index] += 1
        if not self.early or self.learnt[index] < len(batch.micros):
            return None
        early, clock = self.means[index], self._clock(index, batch, update, epoch)
        group = self._group(index, batch, clock)
        return None if group is None else lambda parameter: early.hear(parameter, group)

    def step(
        self, action: Action, batch: Batch, update: int, epoch: int, told: Mapping[str, Tensor]
    ) -> None:
        """Update the block of a `U`; `update` and `epoch` count from the start of the run."""
        index, course = action.block, self.course
        block, sync = self.blocks[index], self.syncs[index]
        self.learnt[index] = 0
        clock, weight = self._clock(index, batch, update, epoch), batch.own / batch.rows
        block.rate(self._factor(update) * sync.rate(clock))
        if course.clips_model:
            if index == self.first:
                self._measure(batch, clock)
        else:
            self._agree(index, batch, clock)
            if course.clip:
                self.norm = squares(block.gradients()) ** 0.5
        if course.clip:
            clip_(block.gradients(), self.norm, course.clip)
        moves, rule = sync.steps(weight, clock), sync.rule(clock)
        self.versions[index].step(action.update, moves, rule)
        sync.after_update(clock)
        if sync.equal:
            compare(block, sync.replicas, update)
        course.objective.after_update(course.tasks[index], block, told)

    def _factor(self, update: int) -> float:
        calendar = self.course.calendar
        return self.course.rate.factor(update, calendar.per_epoch, calendar.total)

    def _clock(self, index: int, batch: Batch, update: int, epoch: int) -> Clock:
        """Return what a sync hears of an update."""
        rate, calendar, peak = self.course.rate, self.course.calendar, self.blocks[index].peak
        length, warming = (calendar.per_epoch, calendar.total), update < rate.warmup_updates
        lr = peak * self._factor(update)
        return Clock(update, epoch, *length, lr, peak, warming, batch.shares)

    def _group(self, index: int, batch: Batch, clock: Clock) -> Group | None:
        """Return over whom a block's gradients are averaged, None for nobody else."""
        group = self.syncs[index].averages(batch.own / batch.rows, clock)
        return group if group is not None and group.comm.size > 1 else None

    def _agree(self, index: int, batch: Batch, clock: Clock) -> None:
        """Average a block's gradients. Collective over its replicas."""
        gradients, group = self.blocks[index].gradients(), self._group(index, batch, clock)
        if group is not None:
            self.means[index].finish(gradients, group)
        self.syncs[index].before_update(gradients, batch.own / batch.rows, clock)

    def _measure(self, batch: Batch, clock: Clock) -> None:
        """Find the norm of the whole model's gradients. Collective over the stages.

        All learning of the update is done before its first `U`, or the schedule is refused.
        """
        own = []
        for index, block in self.blocks.items():
            self._agree(index, batch, clock)
            own.append((index, squares(block.gradients())))
        told = sorted((int(b), float(s)) for rank in self.column.exchange(own) for b, s in rank)
        self.norm = sum(square for _, square in told) ** 0.5
