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

from dtrain.block.block import Block, GradientHook
from dtrain.block.optimizer import clip_by_norm_, squared_norm
from dtrain.block.weight_versions import WeightVersions
from dtrain.comm.communicator import Comm
from dtrain.data.sampler import Batch
from dtrain.engine.spec import EngineSpec
from dtrain.schedules.actions import Action
from dtrain.syncs.base import Sync, UpdateClock
from dtrain.syncs.gradient_reducer import GradientReducer, WeightedGroup
from dtrain.syncs.replica_check import check_replicas_equal


class UpdateStep:
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
        weight_versions: dict[int, WeightVersions],
        engine_spec: EngineSpec,
        pipeline: Comm,
    ) -> None:
        self.blocks, self.syncs, self.weight_versions = blocks, syncs, weight_versions
        self.engine_spec, self.pipeline = engine_spec, pipeline
        self.first_block = min(blocks)
        self.gradient_norm = 0.0
        self.reducers = {index: GradientReducer(block) for index, block in blocks.items()}
        self.backward_counts: Counter[int] = Counter()
        self.overlaps_reduction = False

    def start_segment(self, batches: Sequence[Batch]) -> None:
        """Prepare for a segment's updates.

        Means begin early only where all replicas then make the same calls in one order: a rank
        with several blocks goes through them by a plan, which follows from the shares.
        """
        same = len(self.blocks) == 1 or all(len(set(batch.replica_rows)) == 1 for batch in batches)
        self.overlaps_reduction = same and not self.engine_spec.schedule.splits_backward

    def gradient_hook(
        self, action: Action, batch: Batch, update: int, epoch: int
    ) -> GradientHook | None:
        """Return what to tell of gradients in a `B`, if it is the last before its block's `U`."""
        index = action.block
        self.backward_counts[index] += 1
        if not self.overlaps_reduction or self.backward_counts[index] < len(
            batch.micro_batch_indices
        ):
            return None
        early, clock = self.reducers[index], self._clock(index, batch, update, epoch)
        group = self._gradient_group(index, batch, clock)
        return (
            None if group is None else lambda parameter: early.on_gradient_ready(parameter, group)
        )

    def step(
        self, action: Action, batch: Batch, update: int, epoch: int, received: Mapping[str, Tensor]
    ) -> None:
        """Update the block of a `U`; `update` and `epoch` count from the start of the run."""
        index, course = action.block, self.engine_spec
        block, sync = self.blocks[index], self.syncs[index]
        self.backward_counts[index] = 0
        clock, weight = self._clock(index, batch, update, epoch), batch.local_rows / batch.rows
        block.set_lr_factor(self._lr_factor(update) * sync.lr_factor(clock))
        if course.clips_model:
            if index == self.first_block:
                self._compute_model_norm(batch, clock)
        else:
            self._reduce_gradients(index, batch, clock)
            if course.clip:
                self.gradient_norm = squared_norm(block.gradients()) ** 0.5
        if course.clip:
            clip_by_norm_(block.gradients(), self.gradient_norm, course.clip)
        moves, rule = sync.takes_step(weight, clock), sync.optimizer_step(clock)
        self.weight_versions[index].step(action.update, moves, rule)
        sync.after_update(clock)
        if sync.in_sync:
            check_replicas_equal(block, sync.replicas, update)
        course.objective.after_update(course.block_specs[index], block, received)

    def _lr_factor(self, update: int) -> float:
        calendar = self.engine_spec.training_length
        return self.engine_spec.lr_schedule.lr_factor(
            update, calendar.updates_per_epoch, calendar.total_updates
        )

    def _clock(self, index: int, batch: Batch, update: int, epoch: int) -> UpdateClock:
        """Return what a sync hears of an update."""
        rate, calendar, peak = (
            self.engine_spec.lr_schedule,
            self.engine_spec.training_length,
            self.blocks[index].base_lr,
        )
        length, warming = (
            (calendar.updates_per_epoch, calendar.total_updates),
            update < rate.warmup_updates,
        )
        lr = peak * self._lr_factor(update)
        return UpdateClock(update, epoch, *length, lr, peak, warming, batch.replica_rows)

    def _gradient_group(self, index: int, batch: Batch, clock: UpdateClock) -> WeightedGroup | None:
        """Return over whom a block's gradients are averaged, None for nobody else."""
        group = self.syncs[index].gradient_group(batch.local_rows / batch.rows, clock)
        return group if group is not None and group.comm.size > 1 else None

    def _reduce_gradients(self, index: int, batch: Batch, clock: UpdateClock) -> None:
        """Average a block's gradients. Collective over its replicas."""
        gradients, group = self.blocks[index].gradients(), self._gradient_group(index, batch, clock)
        if group is not None:
            self.reducers[index].finish(gradients, group)
        self.syncs[index].before_update(gradients, batch.local_rows / batch.rows, clock)

    def _compute_model_norm(self, batch: Batch, clock: UpdateClock) -> None:
        """Find the norm of the whole model's gradients. Collective over the stages.

        All learning of the update is done before its first `U`, or the schedule is refused.
        """
        own = []
        for index, block in self.blocks.items():
            self._reduce_gradients(index, batch, clock)
            own.append((index, squared_norm(block.gradients())))
        told = sorted(
            (int(b), float(s)) for rank in self.pipeline.allgather_object(own) for b, s in rank
        )
        self.gradient_norm = sum(square for _, square in told) ** 0.5
