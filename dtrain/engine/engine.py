"""The engine: runs one rank's plan, where maths meets messages.

Invariant: an action takes what its routes bring, computes, and offers what leaves it, in the order
of the plan and in no other; nobody subclasses it, and no schedule or objective has one of its own.

::

    F   x = feed(take)   y = block.forward(x)         offer(y): sent before the update
    B   told = take      block.learn(pulls)           offer(feedback)
    I W   the same in two halves: I takes and offers, W owes nobody
    U   sync.before_update    block.update    sync.after_update
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dtrain.block.block import BackwardPair, Block
from dtrain.block.micro_batch import Given, MicroBatch, RowRandom
from dtrain.block.saved_tensors import SavedTensors
from dtrain.block.split_backward import SplitBackward
from dtrain.block.weight_versions import WeightVersions
from dtrain.comm.groups import ProcessGroups
from dtrain.data.loader import Loader
from dtrain.data.sampler import Batch
from dtrain.engine.closed_form import ClosedFormSolver
from dtrain.engine.metrics import MetricSums
from dtrain.engine.router import MessageRouter
from dtrain.engine.spec import EngineSpec
from dtrain.engine.trace import Trace
from dtrain.engine.update import UpdateStep
from dtrain.errors import NumericalError
from dtrain.mesh import RankPosition
from dtrain.objectives.base import input_gradient_blocks
from dtrain.schedules.actions import Action
from dtrain.syncs.base import Sync

MicroBatchKey = tuple[int, int, int]


class Engine:
    """One rank's blocks and their syncs, run by plans.

    Parameters
    ----------
    seat, lines : Seat, Lines
        This rank's place, and its communicators.
    blocks, syncs : dict of int to Block, to Sync
        What it holds, by block.
    course : Course
        What is learnt, the same on all ranks.
    """

    def __init__(
        self,
        position: RankPosition,
        groups: ProcessGroups,
        blocks: dict[int, Block],
        syncs: dict[int, Sync],
        engine_spec: EngineSpec,
    ) -> None:
        self.position, self.groups, self.blocks, self.syncs = position, groups, blocks, syncs
        self.engine_spec, self.objective, self.block_specs = (
            engine_spec,
            engine_spec.objective,
            engine_spec.block_specs,
        )
        self.router = MessageRouter(
            "train", self.objective, self.block_specs, position, groups, engine_spec.wire_format
        )
        self.closed_form = ClosedFormSolver(
            blocks, self.objective, self.block_specs, groups, position.place[-1]
        )
        self.saved_tensors, self.reparametrisations = (
            SavedTensors(self._model_tensors(), engine_spec.schedule.asynchronous),
            0,
        )
        policy = engine_spec.schedule.policy(position.place, self.router.routes)
        self.weight_versions = {
            i: WeightVersions(b, policy, self.saved_tensors) for i, b in blocks.items()
        }
        self.update_step = UpdateStep(
            blocks, syncs, self.weight_versions, engine_spec, groups.pipeline
        )
        self.micro_batches: dict[MicroBatchKey, MicroBatch] = {}
        self.peak_live = self.largest_update_rows = self.peak_cached_bytes = 0
        self.max_lag = max((route.lag for route in self.router.routes), default=0)
        self.metric_sums = MetricSums()
        self.trace: Trace | None = None
        self.needs_input_gradient = input_gradient_blocks(self.router.routes)
        self.needs_samples = {
            b for b in blocks if self.objective.needs_samples(self.block_specs[b], "train")
        }
        for block in blocks.values():
            block.register_taps(self.objective.taps(block))
            if engine_spec.schedule.splits_backward:
                block.split_backward = SplitBackward(block.roots.values())

    def run(
        self, loader: Loader, batches: Sequence[Batch], first_update: int, epoch: int
    ) -> Iterator[int]:
        """Train on `batches`, update `first` of the run and those that follow.

        Collective over all ranks. Yields the number of each update once it is done; the sums of
        the segment are in `tally` afterwards.

        Raises
        ------
        DtrainError
            A loss, or at the end a weight, is NaN or infinite (code 4).
        """
        sizes, seat = [len(batch.micro_batch_indices) for batch in batches], self.position
        plan = partial(
            self.engine_spec.schedule.plan, seat.stage, seat.place, sizes, self.router.routes
        )
        self.update_step.start_segment(batches)
        self.metric_sums = MetricSums(rows=sum(batch.local_rows for batch in batches))
        start, waited = time.perf_counter(), self.groups.control.wait_s
        for index, block in self.blocks.items():
            block.train()
            self.weight_versions[index].start_segment()
        self.router.open(plan(), sizes, lambda u, micro: len(batches[u].micro_batch_indices[micro]))
        loader.open(
            (
                batches[a.update].micro_batch_indices[a.micro]
                for a in plan()
                if self._reads_samples(a)
            ),
            epoch,
        )
        before = self.closed_form.clear()
        try:
            yield from self._run_actions(plan(), loader, batches, first_update, epoch)
        finally:
            loader.close()
        self.closed_form.solve(before)
        self._check_finite()
        self.router.close()
        self.metric_sums.wall_s = time.perf_counter() - start
        self.metric_sums.busy_s = self.metric_sums.wall_s - (self.groups.control.wait_s - waited)

    def _run_actions(
        self,
        plan: Iterator[Action],
        loader: Loader,
        batches: Sequence[Batch],
        first_update: int,
        epoch: int,
    ) -> Iterator[int]:
        last, fullest = max(self.blocks), max(batch.local_rows for batch in batches)
        if fullest > self.largest_update_rows:  # a larger update than any before has to be seen
            self.largest_update_rows, self.saved_tensors.counting = fullest, True
        control, flight = self.groups.control, self.groups.control.flight
        for action in plan:
            batch, update = batches[action.update], first_update + action.update
            start = time.perf_counter()
            flight.note("action", action, "update", update)
            with self.position.error_context(action, f"update {update}"):
                match action.kind:
                    case "F":
                        self._forward(action, loader, batch, update)
                    case "B" | "I":
                        self._backward(action, batch, update, epoch)
                    case "W":
                        SplitBackward.backward_weight(self.micro_batches[action[1:4]])
                        self._release(action)
                    case _:
                        self._update(action, batch, update, epoch)
            control.progress()
            if self.trace is not None:
                self.trace.note(action, update, start)
            if action.kind == "U" and action.block == last:
                if batch.local_rows == self.largest_update_rows and action.update >= self.max_lag:
                    self.saved_tensors.stop_counting()
                yield update

    def _reads_samples(self, action: Action) -> bool:
        return action.kind == "F" and not action.pass_ and action.block in self.needs_samples

    def _forward(self, action: Action, loader: Loader, batch: Batch, update: int) -> None:
        task, block, key = self.block_specs[action.block], self.blocks[action.block], action[1:4]
        before = self.micro_batches.get(key)
        given = self._forward_inputs(action, loader, batch, update, before)
        with torch.no_grad():
            x = block.writable_input(
                self.objective.make_input(task, block, given), given.samples
            ).detach()
        x.requires_grad_(action.block in self.needs_input_gradient and x.is_floating_point())
        draw = (update, action.micro, self.position.replica)
        last = action.micro + 1 == len(batch.micro_batch_indices)
        with (
            self.weight_versions[action.block].forward_weights(action, last),
            self.saved_tensors.record(key),
        ):
            kept = block.run_forward(x, draw, self.objective.needs_graph(task, action.pass_))
        live = MicroBatch(
            **kept,
            targets=given.targets,
            loss_scale=len(given.targets) / batch.local_rows,
            received=given.received,
            row_random=given.row_random,
            samples=given.samples,
            raw_samples=given.raw_samples,
            indices=given.indices,
            previous_pass=before,
        )
        self.micro_batches[key] = live
        self.saved_tensors.add_micro_batch(key, live)
        self.peak_live = max(self.peak_live, len({(u, m) for _, u, m in self.micro_batches}))
        self.router.send(action, block, live)

    def _forward_inputs(
        self, action: Action, loader: Loader, batch: Batch, update: int, previous: MicroBatch | None
    ) -> Given:
        """Return what a forward is given: messages, data, labels, random numbers."""
        told = self.router.receive(action)
        if previous is not None:
            kept = (
                previous.samples,
                previous.raw_samples,
                previous.indices,
                previous.row_random,
                action.pass_,
                previous,
            )
            return Given(previous.targets, told, *kept, training=True)
        indices = batch.micro_batch_indices[action.micro]
        start = batch.first_row + sum(map(len, batch.micro_batch_indices[: action.micro]))
        draws = RowRandom(
            self.engine_spec.seed, action.block, update, batch.rows, start, len(indices)
        )
        targets = self._to_device(loader.dataset.targets(indices))
        sample = self._to_device(loader.read()) if self._reads_samples(action) else None
        image = None
        if (
            sample is not None
            and self.objective.needs_raw_samples
            and loader.dataset.value_range is not None
        ):
            image = loader.dataset.to_unit_range(sample)
        which = self._to_device(torch.from_numpy(indices))
        return Given(targets, told, sample, image, which, draws, training=True)

    def _backward(self, action: Action, batch: Batch, update: int, epoch: int) -> None:
        block, key = self.blocks[action.block], action[1:4]
        live = self.micro_batches[key]
        live.received = {**live.received, **self.router.receive(action)}
        with self.weight_versions[action.block].backward_weights(action):
            pulls = self._backward_pairs(block, live, key)
            if action.kind == "I":
                assert block.split_backward is not None
                block.split_backward.backward_input(pulls, live)
            else:
                block.backward(pulls, self.update_step.gradient_hook(action, batch, update, epoch))
        self.router.send(action, block, live)
        if action.kind == "B":
            self._release(action)

    def _backward_pairs(
        self, block: Block, micro_batch: MicroBatch, key: MicroBatchKey
    ) -> list[BackwardPair]:
        """Return what the objective pulls at, and note what it measured."""
        if block.recompute:
            self._recompute(block, micro_batch, key)
        with self.saved_tensors.record(key), block.head_rng(micro_batch):
            pulls = [
                *self.objective.backward_pairs(self.block_specs[block.index], block, micro_batch)
            ]
        if micro_batch.loss is not None:
            loss = float(micro_batch.loss)
            if not math.isfinite(loss):
                advice = "lower [optimizer] lr, or set clip"
                raise NumericalError(
                    "todo.key", f"the loss of block {block.index} is {loss}: {advice}"
                )
            self.metric_sums.add_loss(block.index, loss * len(micro_batch.targets))
        for name, mean in micro_batch.metrics.items():
            self.metric_sums.add_metric(block.index, name, float(mean) * len(micro_batch.targets))
        return pulls

    def _recompute(self, block: Block, micro_batch: MicroBatch, key: MicroBatchKey) -> None:
        """Compute again what the passes of a micro-batch did not keep."""
        self.saved_tensors.drop(key)
        with self.saved_tensors.record(key):
            for pass_, each in enumerate(micro_batch.passes()):
                if self.objective.needs_graph(self.block_specs[block.index], pass_):
                    block.recompute_forward(each)
        for each in micro_batch.passes():
            self.saved_tensors.add_micro_batch(key, each)

    def _release(self, action: Action) -> None:
        """Let go of a micro-batch that is learnt."""
        del self.micro_batches[action[1:4]]
        self.saved_tensors.drop(action[1:4])
        self.weight_versions[action.block].done(action)

    def _update(self, action: Action, batch: Batch, update: int, epoch: int) -> None:
        told = self.router.receive(action)
        self.update_step.step(action, batch, update, epoch, told)
        self.router.send(action, self.blocks[action.block], None)
        forms = sum(block.parametrisation_version for block in self.blocks.values())
        if forms != self.reparametrisations:
            self.reparametrisations = forms
            self.saved_tensors.set_model_tensors(self._model_tensors())
        self.peak_cached_bytes = max(
            self.peak_cached_bytes,
            sum(t.nbytes for b in self.blocks.values() for t in b.cached_tensors()),
        )

    def _model_tensors(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers of all blocks."""
        for block in self.blocks.values():
            yield from (*block.parameters.values(), *block.buffers.values())

    def _check_finite(self) -> None:
        """Refuse weights that the segment's last updates made NaN or infinite."""
        for index, block in self.blocks.items():
            for name, tensor in block.parameters.items():
                # The extremes tell, NaN included, and take a fifteenth of the time of `isfinite`.
                if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    place = f"[replica {self.position.replica} stage {self.position.stage}]"
                    raise NumericalError(
                        "todo.key", f"'{name}' of block {index} is not finite {place}"
                    )

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device where this rank computes."""
        return tensor.to(self.engine_spec.device)

    def peak_bytes(self) -> int:
        """Return the most memory of this rank: tensors, gradients, optimizer, saved, messages."""
        blocks = self.blocks.values()
        own = [tensor for block in blocks for tensor in block.tensors().values()]
        memory = [tensor for block in blocks for tensor in block.optimizer_state().values()]
        held = sum(tensor.nbytes for tensor in [*own, *memory]) + self.peak_cached_bytes
        for index, block in self.blocks.items():  # the gradient, and what the sync keeps
            held += (1 + self.syncs[index].parameter_copies) * sum(
                p.nbytes for p in block.trainable_parameters
            )
            held += self.weight_versions[index].peak_bytes
        return held + self.saved_tensors.peak_bytes + self.groups.control.traffic.peak_message_bytes
