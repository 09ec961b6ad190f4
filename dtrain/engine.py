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

from dtrain.block import Block, Pull
from dtrain.closed import Closed
from dtrain.course import Course
from dtrain.data.batches import Batch
from dtrain.data.reader import Reader
from dtrain.errors import NUMERIC, Refusal
from dtrain.live import Draws, Given, Live
from dtrain.mail import Lines, Mail, Seat
from dtrain.objectives.objective import GRADIENT
from dtrain.saved import Saved
from dtrain.schedules.action import Action
from dtrain.split import Split
from dtrain.syncs.sync import Sync
from dtrain.tally import Tally
from dtrain.trace import Trace
from dtrain.updates import Updates
from dtrain.versions import Versions

Key = tuple[int, int, int]


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
        seat: Seat,
        lines: Lines,
        blocks: dict[int, Block],
        syncs: dict[int, Sync],
        course: Course,
    ) -> None:
        self.seat, self.lines, self.blocks, self.syncs = seat, lines, blocks, syncs
        self.course, self.objective, self.tasks = course, course.objective, course.tasks
        self.mail = Mail("train", self.objective, self.tasks, seat, lines, course.parcel)
        self.closed = Closed(blocks, self.objective, self.tasks, lines, seat.place[-1])
        self.saved, self.forms = Saved(self._own(), course.schedule.late), 0
        policy = course.schedule.policy(seat.place, self.mail.routes)
        self.versions = {i: Versions(b, policy, self.saved) for i, b in blocks.items()}
        self.updates = Updates(blocks, syncs, self.versions, course, lines.column)
        self.live: dict[Key, Live] = {}
        self.peak_live = self.fullest = self.kept = 0
        self.late = max((route.lag for route in self.mail.routes), default=0)
        self.tally = Tally()
        self.trace: Trace | None = None
        self.asked = {r.source.block for r in self.mail.routes if r.name == GRADIENT}
        self.readers = {b for b in blocks if self.objective.reads(self.tasks[b], "train")}
        for block in blocks.values():
            block.tap(self.objective.taps(block))
            if course.schedule.splits:
                block.split = Split(block.roots.values())

    def run(
        self, reader: Reader, batches: Sequence[Batch], first: int, epoch: int
    ) -> Iterator[int]:
        """Train on `batches`, update `first` of the run and those that follow.

        Collective over all ranks. Yields the number of each update once it is done; the sums of
        the segment are in `tally` afterwards.

        Raises
        ------
        Refusal
            A loss, or at the end a weight, is NaN or infinite (code 4).
        """
        sizes, seat = [len(batch.micros) for batch in batches], self.seat
        plan = partial(self.course.schedule.plan, seat.stage, seat.place, sizes, self.mail.routes)
        self.updates.open(batches)
        self.tally = Tally(rows=sum(batch.own for batch in batches))
        start, waited = time.perf_counter(), self.lines.control.waited_s
        for index, block in self.blocks.items():
            block.train()
            self.versions[index].open()
        self.mail.open(plan(), sizes, lambda u, micro: len(batches[u].micros[micro]))
        reader.open((batches[a.update].micros[a.micro] for a in plan() if self._reads(a)), epoch)
        before = self.closed.clear()
        try:
            yield from self._actions(plan(), reader, batches, first, epoch)
        finally:
            reader.close()
        self.closed.solve(before)
        self._finite()
        self.mail.close()
        self.tally.wall_s = time.perf_counter() - start
        self.tally.busy_s = self.tally.wall_s - (self.lines.control.waited_s - waited)

    def _actions(
        self,
        plan: Iterator[Action],
        reader: Reader,
        batches: Sequence[Batch],
        first: int,
        epoch: int,
    ) -> Iterator[int]:
        last, fullest = max(self.blocks), max(batch.own for batch in batches)
        if fullest > self.fullest:  # a larger update than any before has to be seen
            self.fullest, self.saved.watching = fullest, True
        control, flight = self.lines.control, self.lines.control.flight
        for action in plan:
            batch, update = batches[action.update], first + action.update
            start = time.perf_counter()
            flight.note("action", action, "update", update)
            with self.seat.at(action, f"update {update}"):
                match action.kind:
                    case "F":
                        self._forward(action, reader, batch, update)
                    case "B" | "I":
                        self._learn(action, batch, update, epoch)
                    case "W":
                        Split.weights(self.live[action[1:4]])
                        self._drop(action)
                    case _:
                        self._update(action, batch, update, epoch)
            control.progress()
            if self.trace is not None:
                self.trace.note(action, update, start)
            if action.kind == "U" and action.block == last:
                if batch.own == self.fullest and action.update >= self.late:
                    self.saved.stop()
                yield update

    def _reads(self, action: Action) -> bool:
        return action.kind == "F" and not action.pass_ and action.block in self.readers

    def _forward(self, action: Action, reader: Reader, batch: Batch, update: int) -> None:
        task, block, key = self.tasks[action.block], self.blocks[action.block], action[1:4]
        before = self.live.get(key)
        given = self._given(action, reader, batch, update, before)
        with torch.no_grad():
            x = block.owned(self.objective.feed(task, block, given), given.sample).detach()
        x.requires_grad_(action.block in self.asked and x.is_floating_point())
        draw = (update, action.micro, self.seat.replica)
        last = action.micro + 1 == len(batch.micros)
        with self.versions[action.block].forward(action, last), self.saved.saving(key):
            kept = block.run(x, draw, self.objective.traced(task, action.pass_))
        live = Live(
            **kept,
            targets=given.targets,
            share=len(given.targets) / batch.own,
            told=given.told,
            draws=given.draws,
            sample=given.sample,
            image=given.image,
            indices=given.indices,
            before=before,
        )
        self.live[key] = live
        self.saved.keep(key, live)
        self.peak_live = max(self.peak_live, len({(u, m) for _, u, m in self.live}))
        self.mail.offer(action, block, live)

    def _given(
        self, action: Action, reader: Reader, batch: Batch, update: int, before: Live | None
    ) -> Given:
        """Return what a forward is given: messages, data, labels, random numbers."""
        told = self.mail.take(action)
        if before is not None:
            kept = before.sample, before.image, before.indices, before.draws, action.pass_, before
            return Given(before.targets, told, *kept, learning=True)
        indices = batch.micros[action.micro]
        start = batch.first + sum(map(len, batch.micros[: action.micro]))
        draws = Draws(self.course.seed, action.block, update, batch.rows, start, len(indices))
        targets = self._here(reader.source.targets(indices))
        sample = self._here(reader.read()) if self._reads(action) else None
        image = None
        if sample is not None and self.objective.raw and reader.source.span is not None:
            image = reader.source.restored(sample)
        which = self._here(torch.from_numpy(indices))
        return Given(targets, told, sample, image, which, draws, learning=True)

    def _learn(self, action: Action, batch: Batch, update: int, epoch: int) -> None:
        block, key = self.blocks[action.block], action[1:4]
        live = self.live[key]
        live.told = {**live.told, **self.mail.take(action)}
        with self.versions[action.block].backward(action):
            pulls = self._pulls(block, live, key)
            if action.kind == "I":
                assert block.split is not None
                block.split.inputs(pulls, live)
            else:
                block.learn(pulls, self.updates.heard(action, batch, update, epoch))
        self.mail.offer(action, block, live)
        if action.kind == "B":
            self._drop(action)

    def _pulls(self, block: Block, live: Live, key: Key) -> list[Pull]:
        """Return what the objective pulls at, and note what it measured."""
        if block.recompute:
            self._recall(block, live, key)
        with self.saved.saving(key), block.helping(live):
            pulls = [*self.objective.pulls(self.tasks[block.index], block, live)]
        if live.loss is not None:
            loss = float(live.loss)
            if not math.isfinite(loss):
                advice = "lower [optimizer] lr, or set clip"
                raise Refusal(f"the loss of block {block.index} is {loss}: {advice}", NUMERIC)
            self.tally.add_loss(block.index, loss * len(live.targets))
        for name, mean in live.figures.items():
            self.tally.add_figure(block.index, name, float(mean) * len(live.targets))
        return pulls

    def _recall(self, block: Block, live: Live, key: Key) -> None:
        """Compute again what the passes of a micro-batch did not keep."""
        self.saved.drop(key)
        with self.saved.saving(key):
            for pass_, each in enumerate(live.passes()):
                if self.objective.traced(self.tasks[block.index], pass_):
                    block.recall(each)
        for each in live.passes():
            self.saved.keep(key, each)

    def _drop(self, action: Action) -> None:
        """Let go of a micro-batch that is learnt."""
        del self.live[action[1:4]]
        self.saved.drop(action[1:4])
        self.versions[action.block].learnt(action)

    def _update(self, action: Action, batch: Batch, update: int, epoch: int) -> None:
        told = self.mail.take(action)
        self.updates.step(action, batch, update, epoch, told)
        self.mail.offer(action, self.blocks[action.block], None)
        forms = sum(block.form for block in self.blocks.values())
        if forms != self.forms:
            self.forms = forms
            self.saved.renew(self._own())
        self.kept = max(self.kept, sum(t.nbytes for b in self.blocks.values() for t in b.kept()))

    def _own(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers of all blocks."""
        for block in self.blocks.values():
            yield from (*block.parameters.values(), *block.buffers.values())

    def _finite(self) -> None:
        """Refuse weights that the segment's last updates made NaN or infinite."""
        for index, block in self.blocks.items():
            for name, tensor in block.parameters.items():
                # The extremes tell, NaN included, and take a fifteenth of the time of `isfinite`.
                if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    place = f"[replica {self.seat.replica} stage {self.seat.stage}]"
                    raise Refusal(f"'{name}' of block {index} is not finite {place}", NUMERIC)

    def _here(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device where this rank computes."""
        return tensor.to(self.course.device)

    def peak_bytes(self) -> int:
        """Return the most memory of this rank: tensors, gradients, optimizer, saved, messages."""
        blocks = self.blocks.values()
        own = [tensor for block in blocks for tensor in block.tensors().values()]
        memory = [tensor for block in blocks for tensor in block.memory().values()]
        held = sum(tensor.nbytes for tensor in [*own, *memory]) + self.kept
        for index, block in self.blocks.items():  # the gradient, and what the sync keeps
            held += (1 + self.syncs[index].copies) * sum(p.nbytes for p in block.trained)
            held += self.versions[index].peak_bytes
        return held + self.saved.peak_bytes + self.lines.control.traffic.peak_held_bytes
