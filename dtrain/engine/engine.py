"""The engine: runs the plan of one rank, and connects computation with communication.

Invariant: each action receives the messages of its routes, computes, and sends its own, in the
order of the plan. No schedule and no objective has an engine of its own.

::

    F     received -> make_input -> x -> layers -> y      send y: before the update
    B     received -> backward_pairs -> backward          send gradients
    I W   B in two halves: I receives and sends, W computes weight gradients
    U     sync.reduce_gradients   block.update   sync.after_update
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.complex_tensors import real_view
from dtrain.block.micro_batch import MicroBatch, RowRandom
from dtrain.block.saved_tensors import SavedTensors
from dtrain.block.split_backward import SplitBackward
from dtrain.block.weight_versions import WeightVersions
from dtrain.comm.early_end import EarlyEnd
from dtrain.comm.groups import ProcessGroups
from dtrain.data.checks.value_check import check_finite
from dtrain.data.dataset import Dataset
from dtrain.data.reading.loader import Loader
from dtrain.data.sampler import Batch
from dtrain.engine.closed_form import ClosedFormSolver
from dtrain.engine.metrics import MetricSums
from dtrain.engine.replay_router import ReplayRouter
from dtrain.engine.router import MessageRouter
from dtrain.engine.skipped_updates import SkipReason
from dtrain.engine.spec import EngineSpec
from dtrain.engine.tied_parameters import DelayedSums, SameUpdateSums, TiedParameters
from dtrain.engine.trace import Trace
from dtrain.engine.update import BatchUpdate, UpdateStep
from dtrain.errors import DataError, DtrainError, NumericalError
from dtrain.mesh import RankPosition
from dtrain.objectives.base import Objective, input_gradient_blocks
from dtrain.objectives.forward import backward_pairs, forward_micro_batch
from dtrain.objectives.messages import reads_samples
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.stream_replay import StreamReplay
from dtrain.syncs.base import Sync

MicroBatchKey = tuple[int, int, int]
"""Block, update and micro-batch: `Action.key`."""


PRESENT_WEIGHTS = nullcontext()
"""The context in which a block without weight versions computes."""


def segments_are_free(objective: Objective, schedule: Schedule, routes: Iterable[Route]) -> bool:
    """Return whether segments of any length train the same bits.

    Not where feedback is delayed, since the end of a segment drains it, nor where heads are solved,
    or given values of other blocks, at the end of a segment, nor where late inputs are replayed.
    """
    closes_sums = objective.accumulated_buffers or objective.broadcast_buffers
    solves = type(objective).solve is not Objective.solve
    is_late = schedule.asynchronous or any(route.lag for route in routes)
    return not (closes_sums or solves or is_late or isinstance(schedule, StreamReplay))


class Engine:
    """One rank's blocks and their syncs, run by plans.

    Parameters
    ----------
    position : RankPosition
        This rank's coordinates on the mesh.
    groups : ProcessGroups
        Its communicators.
    blocks, syncs : dict of int to Block, to Sync
        The blocks of this rank and their syncs, by block index.
    engine_spec : EngineSpec
        The training settings, the same on all ranks.
    """

    def __init__(
        self,
        position: RankPosition,
        groups: ProcessGroups,
        blocks: dict[int, Block],
        syncs: dict[int, Sync],
        engine_spec: EngineSpec,
    ) -> None:
        self.position = position
        self.groups = groups
        self.blocks = blocks
        self.syncs = syncs
        self.engine_spec = engine_spec
        self.objective = engine_spec.objective
        self.block_specs = engine_spec.block_specs
        self.router = self._make_router()
        self.closed_form = ClosedFormSolver(
            blocks, self.objective, self.block_specs, groups, position.place[-1]
        )
        self.saved_tensors = SavedTensors(self._model_tensors(), engine_spec.schedule.asynchronous)
        self.weight_versions = self._make_weight_versions()
        self.update_step = UpdateStep(
            blocks, syncs, self.weight_versions, engine_spec, groups, self._tied_parameters()
        )
        self.micro_batches: dict[MicroBatchKey, MicroBatch] = {}
        self.peak_live = 0
        self.peak_cached_bytes = 0
        self.peak_replay_bytes = 0
        self.largest_update_rows = 0
        self.reparametrisations = 0
        self.max_lag = max((route.lag for route in self.router.routes), default=0)
        self.counts_after_updates = any(
            [block.caches_tensors for block in blocks.values()]
            + [sync.traits().reparametrises for sync in syncs.values()]
        )
        self.metric_sums = MetricSums()
        self.updates: list[BatchUpdate] = []
        self._dataset: Dataset | None = None
        self.trace: Trace | None = None
        self.needs_input_gradient = input_gradient_blocks(self.router.routes)
        self.needs_samples = {
            b for b in blocks if reads_samples(self.objective, self.block_specs[b], "train")
        }
        for block in blocks.values():
            block.register_taps(self.objective.taps(block))
            if engine_spec.schedule.splits_backward:
                block.split_backward = SplitBackward(block.roots.values())

    @property
    def may_end_early(self) -> bool:
        """Whether a segment that ends after any of its updates, and one that begins there, train
        the same bits as one segment."""
        return segments_are_free(self.objective, self.engine_spec.schedule, self.router.routes)

    def run(
        self,
        loader: Loader,
        batches: Sequence[Batch],
        first_update: int,
        epoch: int,
        early_end: EarlyEnd | None = None,
        earlier_sums: MetricSums | None = None,
    ) -> Iterator[int]:
        """Train on `batches`: update `first_update` of the run and those that follow.

        Collective over all ranks. Yields the number of each update when it is done; afterwards
        `metric_sums` holds the sums of the segment. `early_end` may end it before its last update.
        `earlier_sums` are those of the part of the segment that was trained before.

        Raises
        ------
        NumericalError
            A loss, or at the end a weight, is NaN or infinite.
        """
        start, waited = time.perf_counter(), self.groups.control.wait_s
        plan = self._open_segment(loader, batches, first_update, epoch)
        if earlier_sums is not None:
            self.metric_sums.continue_from(earlier_sums)
        previous_sums = self.closed_form.clear()
        if self.update_step.skips is not None:
            self.update_step.skips.start_segment()
        control, last_block = self.groups.control, max(self.blocks)
        try:
            for action in plan:
                if early_end is not None and not early_end.admits(first_update + action.update):
                    continue
                began = time.perf_counter()
                update = self.updates[action.update]
                control.flight.note("action", action, "update", update.number)
                try:
                    self._run_action(action, update, loader)
                except BaseException:
                    with self.position.error_context(action, f"update {update.number}"):
                        raise
                if control.size > 1:  # otherwise nothing is ever in flight
                    control.progress()
                if self.trace is not None:
                    self.trace.note(action, update.number, began)
                if action.kind == "U" and action.block == last_block:
                    if self.saved_tensors.counting:
                        self._stop_counting(action.update)
                    yield update.number
        finally:
            loader.close()
        self.router.end_sends()
        if early_end is not None:
            self._drop_updates(early_end.end_of(first_update + len(batches)) - first_update)
        self.update_step.finish_segment()
        self.closed_form.solve(previous_sums)
        self._check_finite()
        self.router.close()
        self.peak_replay_bytes = max(self.peak_replay_bytes, self.router.kept_bytes)
        self.metric_sums.wall_s = time.perf_counter() - start
        self.metric_sums.busy_s = self.metric_sums.wall_s - (control.wait_s - waited)

    def _run_action(self, action: Action, update: BatchUpdate, loader: Loader) -> None:
        """Receive the messages of an action, compute, and send its own."""
        received, micro_batch = self.router.receive(action), None
        match action.kind:
            case "F":
                micro_batch = self._forward(action, update, received, loader)
            case "B" | "I":
                micro_batch = self._backward(action, update, received)
            case "W":
                micro_batch = self._backward_weight(action)
            case _:
                self.update_step.step(action, update, received)
                if self.counts_after_updates:
                    self._count_after_update()
        block = self.blocks[action.block]
        self.router.send(action, block, micro_batch)
        if micro_batch is not None and action.kind == "F" and not block.keeps_forward:
            self.saved_tensors.release_forward(micro_batch, keep_input=not block.rebuilds_input)
        if micro_batch is not None and action.kind == "F":
            for name, value in self.router.forward_metrics(action).items():
                rows = len(micro_batch.targets)
                self.metric_sums.add_metric(action.block, name, value * rows)

    def _drop_updates(self, trained: int) -> None:
        """Forget the updates of the segment after its first `trained`, if it has ended early."""
        if trained == len(self.updates):
            return
        self.updates = self.updates[:trained]
        self.metric_sums.rows = sum(update.local_rows for update in self.updates)
        self.metric_sums.loss_weight = sum(update.loss_count for update in self.updates)
        self.router.cancel()

    def _open_segment(
        self, loader: Loader, batches: Sequence[Batch], first_update: int, epoch: int
    ) -> list[Action]:
        """Prepare for a segment; return this rank's plan of it."""
        sizes = [len(batch.micro_batch_indices) for batch in batches]
        plan = list(
            self.engine_spec.schedule.plan(
                self.position.stage, self.position.place, sizes, self.router.routes
            )
        )
        self._dataset = loader.dataset
        self.updates = self.update_step.start_segment(batches, loader.dataset, first_update, epoch)
        self.metric_sums = MetricSums(
            rows=sum(update.local_rows for update in self.updates),
            loss_weight=sum(update.loss_count for update in self.updates),
        )
        largest = max(update.local_rows for update in self.updates)
        if largest > self.largest_update_rows:  # it needs more memory than those counted so far
            self.largest_update_rows = largest
            self.saved_tensors.counting = True
        for block in self.blocks.values():
            block.train()
        for versions in self.weight_versions.values():
            versions.start_segment()
        self.router.open(plan, sizes, lambda u, micro: len(batches[u].micro_batch_indices[micro]))
        loader.open(
            (
                batches[action.update].micro_batch_indices[action.micro]
                for action in plan
                if self._reads_samples(action)
            ),
            epoch,
        )
        return plan

    def _make_router(self) -> MessageRouter:
        """Return the router of training."""
        spec = self.engine_spec
        others = self.objective, self.block_specs, self.position, self.groups
        if isinstance(spec.schedule, StreamReplay):
            return ReplayRouter("train", *others, schedule=spec.schedule)
        return MessageRouter("train", *others, spec.wire_format)

    def _tied_parameters(self) -> TiedParameters | None:
        """Return the parameters with copies in several blocks. Collective over the stages."""
        ties = self.engine_spec.ties
        if not ties:
            return None
        pipeline, place = self.groups.pipeline.dup("tied parameters"), self.position.place
        schedule = self.engine_spec.schedule
        if schedule.flushes:
            return SameUpdateSums(ties, self.blocks, place, pipeline)
        cycles = schedule.update_cycles(len(place), self.router.routes)
        assert cycles is not None, "the layout refuses ties under this schedule"
        return DelayedSums(ties, self.blocks, place, pipeline, cycles)

    def _make_weight_versions(self) -> dict[int, WeightVersions]:
        """Return the weight versions of the blocks that learn from late gradients."""
        policy = self.engine_spec.schedule.policy(self.position.place, self.router.routes)
        if policy is None:
            return {}
        return {
            index: WeightVersions(block, policy, self.saved_tensors)
            for index, block in self.blocks.items()
            if block.trainable_parameters
        }

    def _reads_samples(self, action: Action) -> bool:
        return action.kind == "F" and not action.pass_ and action.block in self.needs_samples

    def _forward(
        self,
        action: Action,
        update: BatchUpdate,
        received: dict[str, Tensor],
        loader: Loader,
    ) -> MicroBatch:
        previous = self.micro_batches.get(action.key)
        micro_batch = (
            self._new_micro_batch(action, update, received, loader)
            if previous is None
            else previous.next_pass(received)
        )
        versions = self.weight_versions.get(action.block)
        last = action.micro + 1 == update.micro_batches
        with PRESENT_WEIGHTS if versions is None else versions.forward_weights(action, last):
            forward_micro_batch(
                self.objective,
                self.block_specs[action.block],
                self.blocks[action.block],
                micro_batch,
                action.block in self.needs_input_gradient,
                self.saved_tensors,
            )
        self.micro_batches[action.key] = micro_batch
        self.peak_live = max(self.peak_live, len({(u, m) for _, u, m in self.micro_batches}))
        return micro_batch

    def _new_micro_batch(
        self,
        action: Action,
        update: BatchUpdate,
        received: dict[str, Tensor],
        loader: Loader,
    ) -> MicroBatch:
        """Return a micro-batch before its first pass: messages, data, labels, random numbers."""
        device = self.engine_spec.device
        origin, micro = self.router.source_of(action)
        source = self.updates[origin]
        batch = source.batch
        indices = batch.micro_batch_indices[micro]
        start = batch.first_row + sum(map(len, batch.micro_batch_indices[:micro]))
        samples = raw_samples = None
        others: tuple[Tensor, ...] = ()
        if action.block in self.needs_samples:
            samples = loader.read().to(device)
            others = tuple(x.to(device) for x in loader.read_other_inputs(indices))
            if self.objective.needs_raw_samples and loader.dataset.value_range is not None:
                raw_samples = loader.dataset.to_unit_range(samples)
        targets, task = loader.dataset.targets(indices), self.engine_spec.task
        weights = loader.dataset.read_sample_weights(indices)
        count = task.count(targets, weights)
        return MicroBatch(
            targets=targets.to(device),
            weights=None if weights is None else weights.to(device),
            task=task,
            loss_scale=count / update.loss_count if count else 0.0,
            received=received,
            samples=samples,
            other_samples=others,
            raw_samples=raw_samples,
            indices=torch.from_numpy(indices).to(device),
            row_random=RowRandom(
                self.engine_spec.seed,
                action.block,
                source.number,
                source.total_rows,
                start,
                len(indices),
            ),
            training=True,
            rng_key=(update.number, action.micro, self.position.replica),
        )

    def _backward(
        self, action: Action, update: BatchUpdate, received: dict[str, Tensor]
    ) -> MicroBatch:
        block, micro_batch = self.blocks[action.block], self.micro_batches[action.key]
        micro_batch.received = {**micro_batch.received, **received}
        spec, versions = self.block_specs[action.block], self.weight_versions.get(action.block)
        with PRESENT_WEIGHTS if versions is None else versions.backward_weights(action):
            pairs = backward_pairs(self.objective, spec, block, micro_batch, self.saved_tensors)
            self._add_metrics(block.index, micro_batch)
            if action.kind == "I":
                assert block.split_backward is not None
                block.split_backward.backward_input(pairs, micro_batch)
            else:
                block.backward(pairs, self.update_step.gradient_hook(action, update))
        if action.kind == "B":
            self._release(action, micro_batch)
        return micro_batch

    def _backward_weight(self, action: Action) -> MicroBatch:
        micro_batch = self.micro_batches[action.key]
        SplitBackward.backward_weight(micro_batch)
        self._release(action, micro_batch)
        return micro_batch

    def _add_metrics(self, index: int, micro_batch: MicroBatch) -> None:
        """Add the loss and the metrics of a micro-batch; refuse, or skip, a loss that is not
        finite."""
        rows, count = len(micro_batch.targets), micro_batch.count
        skips = self.update_step.skips
        if micro_batch.loss is not None:
            loss = float(micro_batch.loss)
            if math.isfinite(loss):
                self.metric_sums.add_loss(index, loss * count, count)
            else:
                error = self._loss_error(index, loss, micro_batch)
                if skips is None:
                    raise error
                text = error.message.partition(":")[0]
                skips.note(SkipReason(micro_batch.rng_key[0], index, "loss", text))
                self.metric_sums.leave_out(index, count)
        for name, mean in micro_batch.metrics.items():
            value = float(mean)
            if skips is None or math.isfinite(value):
                self.metric_sums.add_metric(index, name, value * rows)

    def _loss_error(self, index: int, loss: float, micro_batch: MicroBatch) -> DtrainError:
        """Return the error of a loss that is not finite: of the data, if those are the cause."""
        assert self._dataset is not None
        rows = np.unique(micro_batch.indices.cpu().numpy())
        try:
            check_finite(self._dataset, "train", rows, math.inf)
        except (DtrainError, OSError) as error:
            if isinstance(error, DataError) and error.key == "data.not-finite":
                return error  # else this rank cannot read inputs
        same = [m for m in self.micro_batches.values() if m.rng_key == micro_batch.rng_key]
        read = [real_view(m.samples) for m in same if m.samples is not None]
        if not all(bool(samples.isfinite().all()) for samples in read):
            return DataError(
                "data.augmented-not-finite",
                f"an augmented sample is not finite, but the stored one is (samples {rows[0]} to "
                f"{rows[-1]} of the train split): correct the function of [data] augment",
            )
        return NumericalError(
            "training.loss-not-finite",
            f"the loss of block {index} is {loss}: lower [optimizer] lr, or set clip",
        )

    def _release(self, action: Action, micro_batch: MicroBatch) -> None:
        """Forget a micro-batch whose backward is done."""
        del self.micro_batches[action.key]
        if micro_batch.saved_sizes:
            self.saved_tensors.drop(micro_batch)
        if action.block in self.weight_versions:
            self.weight_versions[action.block].done(action)

    def _count_after_update(self) -> None:
        """Follow parameters that a sync has replaced, and tensors that heads have cached."""
        versions = sum(block.parametrisation_version for block in self.blocks.values())
        if versions != self.reparametrisations:
            self.reparametrisations = versions
            self.saved_tensors.set_model_tensors(self._model_tensors())
        cached = sum(t.nbytes for b in self.blocks.values() for t in b.cached_tensors())
        self.peak_cached_bytes = max(self.peak_cached_bytes, cached)

    def _stop_counting(self, index: int) -> None:
        """Stop counting saved tensors if update `index` of the segment needed the most memory."""
        largest = self.updates[index].local_rows == self.largest_update_rows
        # All routes carry messages by then, and no forward is without its backward.
        if largest and index >= self.max_lag and not self.micro_batches:
            self.saved_tensors.stop_counting()

    def _model_tensors(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers of all blocks."""
        for block in self.blocks.values():
            yield from (*block.parameters.values(), *block.buffers.values())

    def _check_finite(self) -> None:
        """Raise `NumericalError` if the last updates made a weight NaN or infinite."""
        for index, block in self.blocks.items():
            for name, tensor in block.parameters.items():
                # The extremes are NaN if any element is; they take 1/15 of the time of `isfinite`.
                reals = real_view(tensor.detach())
                if reals.numel() and not torch.stack(reals.aminmax()).isfinite().all():
                    place = f"[replica {self.position.replica} stage {self.position.stage}]"
                    raise NumericalError(
                        "training.weight-not-finite",
                        f"'{name}' of block {index} is not finite: lower [optimizer] lr, or set "
                        f"clip {place}",
                    )

    def peak_bytes(self) -> int:
        """Return the peak memory of this rank in bytes.

        It counts the tensors of the blocks, their gradients, optimizer states and weight versions,
        the copies that the syncs keep, kept gradients of tied parameters, saved tensors and
        messages.
        """
        blocks = self.blocks.values()
        tensors = [tensor for block in blocks for tensor in block.tensors().values()]
        states = [tensor for block in blocks for tensor in block.optimizer_state().values()]
        total = sum(tensor.nbytes for tensor in [*tensors, *states]) + self.peak_cached_bytes
        for index, block in self.blocks.items():
            trainable = sum(parameter.nbytes for parameter in block.trainable_parameters)
            copies = self.syncs[index].traits().parameter_copies
            total += (1 + copies) * trainable  # 1: the gradient
        total += self.peak_replay_bytes
        total += sum(versions.peak_bytes for versions in self.weight_versions.values())
        total += 0 if self.update_step.tied is None else self.update_step.tied.peak_bytes
        return (
            total + self.saved_tensors.peak_bytes + self.groups.control.traffic.peak_message_bytes
        )
