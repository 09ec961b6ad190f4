"""An update of one block: the learning rate, what replicas agree on, clipping, the step.

Invariant: with a clip over blocks nothing of one block depends on another; with a clip over the
model the norm is summed block by block in order, so that it is the same on any number of stages.

::

    last backward: sync.hear of each gradient that is complete
    rate -> sync.before_update -> clip -> step -> sync.after_update -> objective.after_update
                                   |                       |
                                   |                       in debug mode: are replicas equal?
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
from dtrain.optimizers import clip_, squares
from dtrain.replicas import compare
from dtrain.syncs.sync import Clock, Sync


class Updates:
    """Updates one rank's blocks.

    Parameters
    ----------
    column : Comm
        The stages of this replica.
    """

    def __init__(
        self, blocks: dict[int, Block], syncs: dict[int, Sync], course: Course, column: Comm
    ) -> None:
        self.blocks, self.syncs, self.course, self.column = blocks, syncs, course, column
        self.first = min(blocks)
        self.norm = 0.0
        self.learnt: Counter[int] = Counter()
        self.early = False

    def open(self, batches: Sequence[Batch]) -> None:
        """Prepare for a segment's updates.

        Syncs hear of gradients only where all replicas then make the same calls in one order: a
        rank with several blocks goes through them by a plan, which follows from the shares.
        """
        same = len(self.blocks) == 1 or all(len(set(batch.shares)) == 1 for batch in batches)
        self.early = same and not self.course.schedule.splits

    def heard(self, index: int, batch: Batch) -> Heard | None:
        """Return what to tell of gradients in a backward, if it is the last of block `index`."""
        self.learnt[index] += 1
        if not self.early or self.learnt[index] < len(batch.micros):
            return None
        sync, weight = self.syncs[index], batch.own / batch.rows
        return lambda parameter: sync.hear(parameter, weight)

    def step(
        self, index: int, batch: Batch, update: int, epoch: int, told: Mapping[str, Tensor]
    ) -> None:
        """Update block `index`; `update` and `epoch` count from the start of the run."""
        course, block, sync = self.course, self.blocks[index], self.syncs[index]
        self.learnt[index] = 0
        calendar = course.calendar
        block.rate(course.rate.factor(update, calendar.per_epoch, calendar.total))
        length = calendar.per_epoch, calendar.total
        warming = update < course.rate.warmup_updates
        clock = Clock(update, epoch, *length, block.lr, block.peak, warming, batch.shares)
        weight = batch.own / batch.rows
        if course.clips_model:
            if index == self.first:
                self._measure(weight, clock)
        else:
            sync.before_update(block.gradients(), weight, clock)
            if course.clip:
                self.norm = squares(block.gradients()) ** 0.5
        if course.clip:
            clip_(block.gradients(), self.norm, course.clip)
        if sync.steps(weight, clock):
            block.update()
        sync.after_update(clock)
        if sync.equal:
            compare(block, sync.replicas, update)
        course.objective.after_update(course.tasks[index], block, told)

    def _measure(self, weight: float, clock: Clock) -> None:
        """Find the norm of the whole model's gradients. Collective over the stages.

        All learning of the update is done before its first `U`, or the schedule is refused.
        """
        own = []
        for index, block in self.blocks.items():
            self.syncs[index].before_update(block.gradients(), weight, clock)
            own.append((index, squares(block.gradients())))
        told = sorted((int(b), float(s)) for rank in self.column.exchange(own) for b, s in rank)
        self.norm = sum(square for _, square in told) ** 0.5
