"""The update of one block: learning rate, averaged gradients, clipping, optimizer step.

Invariant: with a clip over blocks no block depends on another. With a clip over the model, the
squared norms are added block by block in order, so the norm is the same on any number of stages.

::

    last backward: the all-reduce of gradients that are complete begins
    finite? -> learning rate -> averaged gradients, sync.before_update -> clip -> optimizer step
                                                                             |
                            objective.after_update <- equal replicas? <- sync.after_update

    over the model: the squared norms of all blocks are gathered over the stages of the replica
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from dtrain.block.block import Block, GradientHook
from dtrain.block.optimizer import clip_by_norm_, squared_norm
from dtrain.block.weight_versions import WeightVersions
from dtrain.comm.groups import ProcessGroups
from dtrain.data.dataset import Dataset
from dtrain.data.sampler import Batch
from dtrain.engine.skipped_updates import SkippedUpdates
from dtrain.engine.spec import EngineSpec
from dtrain.engine.tied_parameters import TiedParameters
from dtrain.objectives.base import input_gradient_blocks
from dtrain.schedules.actions import Action
from dtrain.syncs.base import Sync, UpdateClock
from dtrain.syncs.replica_check import check_replicas_equal, check_replicas_quickly


@dataclass(frozen=True, slots=True)
class BatchUpdate:
    """One update of this replica.

    Attributes
    ----------
    number, epoch : int
        Counted from the start of the run.
    batch : Batch
        Its samples.
    micro_batches : int
        Number of micro-batches.
    local_rows, total_rows : int
        Samples of this replica, and of all replicas.
    counts : tuple of float
        Samples of each replica, or their counted positions or weights.
    loss_count : float
        The count of this replica.
    weight : float
        Its share of the sum of the counts.
    lr_factor : float
        The factor of the learning-rate schedule.
    """

    number: int
    epoch: int
    batch: Batch
    micro_batches: int
    local_rows: int
    total_rows: int
    counts: tuple[float, ...]
    loss_count: float
    weight: float
    lr_factor: float


class UpdateStep:
    """Updates one rank's blocks.

    Parameters
    ----------
    groups : ProcessGroups
        The communicators of this rank.
    tied : TiedParameters, optional
        Parameters with copies in several blocks.

    Attributes
    ----------
    lr_scale : float
        Factor of the learning rates of the updates of later segments.
    after_update : callable, optional
        Called with a block and the number of the update that it has just had.
    skips : SkippedUpdates or None
        The updates that are skipped; None: none is.
    records_norms : bool
        Whether `gradient_norms` is wanted.
    gradient_norms : dict of int to float
        Norms of the gradients of the blocks in the last update of a segment, before clipping.
    """

    def __init__(
        self,
        blocks: dict[int, Block],
        syncs: dict[int, Sync],
        weight_versions: dict[int, WeightVersions],
        engine_spec: EngineSpec,
        groups: ProcessGroups,
        tied: TiedParameters | None = None,
    ) -> None:
        self.tied = tied
        self.reduces_all_blocks = engine_spec.clips_model or (
            tied is not None and tied.needs_all_blocks
        )
        self.blocks = blocks
        self.syncs = syncs
        self.weight_versions = weight_versions
        self.engine_spec = engine_spec
        self.groups = groups
        self.first_block = min(blocks)
        self.checks_replicas = groups.control.context.debug_mode
        self.skips = self._skipped_updates()
        self.gradient_norm = 0.0
        self.overlaps_reduction = False
        self.lr_scale = 1.0
        self.after_update: Callable[[Block, int], None] | None = None
        self.gradient_norms: dict[int, float] = {}
        self.records_norms = False
        self._last_update = -1
        self._clocks: dict[int, UpdateClock] = {}
        self._next_checks: dict[int, int] = {}

    def _skipped_updates(self) -> SkippedUpdates | None:
        """Return the updates that are skipped. Collective over all ranks."""
        spec = self.engine_spec
        if spec.max_skipped is None:
            return None
        routes = spec.objective.routes(len(spec.block_specs), "train")
        couples = self.reduces_all_blocks or bool(input_gradient_blocks(routes))
        shares = couples and spec.schedule.flushes
        return SkippedUpdates(self.blocks, self.syncs, shares, self.groups, spec.max_skipped)

    def start_segment(
        self, batches: Sequence[Batch], dataset: Dataset, first_update: int, epoch: int
    ) -> list[BatchUpdate]:
        """Return the updates of a segment.

        All-reduces begin in the backward only where all replicas then make the same calls in one
        order: a rank with several blocks follows its plan, which depends on the replicas' rows.
        """
        self._last_update = first_update + len(batches) - 1
        equal = len(self.blocks) == 1 or all(len(set(batch.replica_rows)) == 1 for batch in batches)
        whole = not self.engine_spec.schedule.splits_backward
        has_replicas = self.groups.replicas.size > 1
        self.overlaps_reduction = equal and whole and has_replicas and self.skips is None
        if self.tied is not None:
            self.tied.start_segment(len(batches))
        return [
            self._make_update(batch, dataset, number, epoch)
            for number, batch in enumerate(batches, first_update)
        ]

    def _make_update(self, batch: Batch, dataset: Dataset, number: int, epoch: int) -> BatchUpdate:
        lr_schedule, length = self.engine_spec.lr_schedule, self.engine_spec.training_length
        counts, replica = self._count_replicas(batch, dataset), self.groups.replicas.rank
        total = sum(counts)
        return BatchUpdate(
            number=number,
            epoch=epoch,
            batch=batch,
            micro_batches=len(batch.micro_batch_indices),
            local_rows=batch.local_rows,
            total_rows=batch.rows,
            counts=counts,
            loss_count=counts[replica],
            weight=counts[replica] / total if total else batch.local_rows / batch.rows,
            lr_factor=self.lr_scale
            * lr_schedule.lr_factor(number, length.updates_per_epoch, length.total_updates),
        )

    def _count_replicas(self, batch: Batch, dataset: Dataset) -> tuple[float, ...]:
        """Return the samples of each replica, or their counted positions or weights: targets are
        read by index, so no message is needed."""
        task = self.engine_spec.task
        if not (task.counts_positions or task.target_spec.weighted):
            return batch.replica_rows
        ends = accumulate(batch.replica_rows, initial=0)
        parts = [batch.update_indices[start:stop] for start, stop in pairwise(ends)]
        return tuple(
            task.count(dataset.targets(part), dataset.read_sample_weights(part))
            if len(part)
            else 0.0
            for part in parts
        )

    def gradient_hook(self, action: Action, update: BatchUpdate) -> GradientHook | None:
        """Return the hook of a block's last `B` before its `U`, where gradients are averaged."""
        index = action.block
        if not self.overlaps_reduction or action.micro + 1 < update.micro_batches:
            return None
        clock = self._clocks[index] = self._make_clock(index, update)
        return self.syncs[index].gradient_hook(self.blocks[index], update.weight, clock)

    def step(self, action: Action, update: BatchUpdate, received: Mapping[str, Tensor]) -> None:
        """Update the block of a `U`."""
        index, spec = action.block, self.engine_spec
        block, sync = self.blocks[index], self.syncs[index]
        clock = self._clocks.pop(index, None) or self._make_clock(index, update)
        block.set_lr_factor(update.lr_factor * sync.lr_factor(clock))
        if self.skips is not None and self.skips.decide(index, update.number):
            self._skip(action, self.skips, clock)
            return
        if self.reduces_all_blocks:
            if index == self.first_block:
                self._reduce_all_blocks(action, update)
        else:
            sync.reduce_gradients(block, update.weight, clock)
            if self.tied is not None:
                self.tied.sum_gradients(index, action.update)
            if spec.clip:
                self.gradient_norm = squared_norm(block.gradients()) ** 0.5
        if self.records_norms and update.number == self._last_update:
            self.gradient_norms[index] = squared_norm(block.gradients()) ** 0.5
        if spec.clip:
            clip_by_norm_(block.gradients(), self.gradient_norm, spec.clip)
        takes_step = sync.takes_step(update.weight, clock)
        optimizer_step = sync.optimizer_step(clock)
        if index in self.weight_versions:
            self.weight_versions[index].step(action.update, takes_step, optimizer_step)
        elif takes_step:
            block.update(optimizer_step)
        sync.after_update(clock)
        self._check_replicas(index, update.number)
        spec.objective.after_update(spec.block_specs[index], block, received)
        if self.skips is not None:
            self.skips.keep_buffers(index)
        if self.after_update is not None:
            self.after_update(block, update.number)

    def _skip(self, action: Action, skips: SkippedUpdates, clock: UpdateClock) -> None:
        """Advance a block by one update without a step; nothing but the clock of its sync moves."""
        index = action.block
        block, sync = self.blocks[index], self.syncs[index]
        block.drop_gradients(block.trainable_parameters)
        skips.restore_buffers(index)
        sync.before_skipped_update(clock)
        if index in self.weight_versions:
            self.weight_versions[index].step(action.update, takes_step=False)
        sync.after_update(clock)
        self._check_replicas(index, clock.update)

    def _check_replicas(self, index: int, update: int) -> None:
        """Compare the replicas of a block if that is due and they must be equal now."""
        sync, interval = self.syncs[index], self.engine_spec.check_replicas
        if not sync.in_sync:
            return
        if self.checks_replicas:
            check_replicas_equal(self.blocks[index], sync.replicas, update)
        elif interval:
            done, last = update + 1, self.engine_spec.training_length.total_updates
            due = self._next_checks.setdefault(index, (update // interval + 1) * interval)
            if done >= due or done == last:
                self._next_checks[index] = (done // interval + 1) * interval
                check_replicas_quickly(self.blocks[index], sync.replicas, update)

    def _make_clock(self, index: int, update: BatchUpdate) -> UpdateClock:
        length, base_lr = self.engine_spec.training_length, self.blocks[index].base_lr
        return UpdateClock(
            update=update.number,
            epoch=update.epoch,
            updates_per_epoch=length.updates_per_epoch,
            total_updates=length.total_updates,
            lr=base_lr * update.lr_factor,
            base_lr=base_lr,
            in_lr_warmup=update.number < self.engine_spec.lr_schedule.warmup_updates,
            rows_per_replica=update.counts,
        )

    def finish_segment(self) -> None:
        """Apply the gradients of tied parameters that no step of the segment has applied."""
        if self.tied is not None:
            self.tied.finish_segment()

    def _reduce_all_blocks(self, action: Action, update: BatchUpdate) -> None:
        """Reduce the gradients of all blocks, add those of tied parameters, and compute the norm of
        the whole model's gradient if that is clipped. Collective over the stages.

        The schedule guarantees that all backwards of the update come before its first `U`.
        """
        for index, block in self.blocks.items():
            clock = self._clocks.get(index) or self._make_clock(index, update)
            self._clocks[index] = clock
            self.syncs[index].reduce_gradients(block, update.weight, clock)
        if self.tied is not None:
            self.tied.sum_gradients(action.block, action.update)
        if self.engine_spec.clips_model:
            self._compute_model_norm()

    def _compute_model_norm(self) -> None:
        """Compute the norm of the whole model's gradient. Collective over the stages."""
        squares = []
        for index, block in self.blocks.items():
            gradients = block.gradients()
            if self.tied is not None:  # a copy counts once
                gradients = self.tied.gradients_without_copies(index)
            squares.append((index, squared_norm(gradients)))
        all_squares = sorted(
            (int(b), float(s))
            for rank in self.groups.pipeline.allgather_object(squares)
            for b, s in rank
        )
        self.gradient_norm = sum(square for _, square in all_squares) ** 0.5
