"""The engine: runs one rank's plan, where maths meets messages.

Invariant: an action takes what its routes bring, computes, and offers what leaves it, in the order
of the plan and in no other; nobody subclasses it, and no schedule or objective has one of its own.

::

    F   x = take      y = block.forward(x)         offer(y): sent before the update
    B   told = take   block.learn(pulls)           offer(feedback)
    U   sync.before_update    block.update    sync.after_update
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dtrain.block import Block, Live
from dtrain.data.batches import Batch, Indices
from dtrain.data.source import Source
from dtrain.errors import NUMERIC, Refusal
from dtrain.gauge import Gauge
from dtrain.mail import Lines, Mail, Seat
from dtrain.objectives.objective import ACTIVATION, VOTE_DTYPE, VOTES, Objective, Task
from dtrain.schedules.action import Action
from dtrain.schedules.schedule import Schedule, forward
from dtrain.syncs.sync import Clock, Sync

Key = tuple[int, int, int]


@dataclass
class Tally:
    """Sums over the rows that one rank has seen, by block where blocks differ.

    Attributes
    ----------
    rows : int
        Samples.
    loss : dict of int to float
        Sum of the losses over rows.
    correct, voted : dict of int to int, int
        Rows that a block, and that the vote, predicted rightly.
    busy_s, wall_s : float
        Seconds at work, and seconds in all; the rest was spent in waits.
    """

    rows: int = 0
    loss: dict[int, float] = field(default_factory=dict)
    correct: dict[int, int] = field(default_factory=dict)
    voted: int = 0
    busy_s: float = 0.0
    wall_s: float = 0.0

    def add_loss(self, block: int, total: float) -> None:
        """Add a sum of losses over rows."""
        self.loss[block] = self.loss.get(block, 0.0) + total


@dataclass(frozen=True)
class Course:
    """What is learnt, and in which order; the same on all ranks.

    Attributes
    ----------
    tasks : sequence of Task
        One per block of the run.
    dtype : torch.dtype
        Of the weights, and so of inputs that are numbers.
    epochs : int
        Length of the run, for the syncs' clock.
    """

    objective: Objective
    schedule: Schedule
    tasks: Sequence[Task]
    dtype: torch.dtype
    epochs: int


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
        self.mail = Mail("train", self.objective, self.tasks, seat, lines)
        self.post = Mail("predict", self.objective, self.tasks, seat, lines)
        self.gauge = Gauge(t for block in blocks.values() for t in block.tensors().values())
        self.live: dict[Key, Live] = {}
        self.peak_live = 0
        self.tally = Tally()
        self.feedback = {(r.source.block, r.source.kind) for r in self.mail.routes}

    def run(
        self, source: Source, batches: Sequence[Batch], first: int, epoch: int
    ) -> Iterator[int]:
        """Train on `batches`, update `first` of the run and those that follow.

        Collective over all ranks. Yields the number of each update once it is done; the sums of
        the segment are in `tally` afterwards.

        Raises
        ------
        Refusal
            A loss, or at the end a weight, is NaN or infinite (code 4).
        """
        sizes = [len(batch.micros) for batch in batches]
        routes, seat = self.mail.routes, self.seat
        plan = partial(self.course.schedule.plan, seat.stage, seat.place, sizes, routes)
        self.tally = Tally(rows=sum(batch.own for batch in batches))
        start, waited = time.perf_counter(), self.lines.control.waited_s
        for block in self.blocks.values():
            block.train()
        self.mail.open(plan(), lambda action: len(batches[action.update].micros[action.micro]))
        last, fullest = max(self.blocks), max(batch.own for batch in batches)
        for action in plan():
            batch, update = batches[action.update], first + action.update
            with self._at(action, f"update {update}"):
                if action.kind == "F":
                    self._forward(action, source, batch, update)
                elif action.kind == "B":
                    self._learn(action, batch)
                else:
                    self._update(action.block, batch, update, epoch)
            for sync in self.syncs.values():
                sync.poll()
            if action.kind == "U" and action.block == last:
                if batch.own == fullest:
                    self.gauge.stop()
                yield update
        self._finite()
        self.mail.close()
        self.tally.wall_s = time.perf_counter() - start
        self.tally.busy_s = self.tally.wall_s - (self.lines.control.waited_s - waited)

    def _forward(self, action: Action, source: Source, batch: Batch, update: int) -> None:
        block, indices = self.blocks[action.block], batch.micros[action.micro]
        told = self.mail.take(action)
        x = told.pop(ACTIVATION) if action.block else self._read(source, indices)
        x.requires_grad_((action.block, "B") in self.feedback and x.is_floating_point())
        key = (action.block, action.update, action.micro)
        with self.gauge.saving(key):
            y = block.forward(x, (update, action.micro, self.seat.replica))
        live = Live(x, y, source.targets(indices), len(indices) / batch.own, told)
        self.live[key] = live
        self.peak_live = max(self.peak_live, len({(u, m) for _, u, m in self.live}))
        self.mail.offer(action, live)

    def _learn(self, action: Action, batch: Batch) -> None:
        block, key = self.blocks[action.block], (action.block, action.update, action.micro)
        live = self.live[key]
        live.told = self.mail.take(action)
        with self.gauge.saving(key):
            pulls = self.objective.pulls(self.tasks[action.block], block, live)
        if live.loss is not None:
            loss = float(live.loss)
            if not math.isfinite(loss):
                raise Refusal(f"the loss of block {action.block} is {loss}", NUMERIC)
            self.tally.add_loss(action.block, loss * len(live.targets))
        block.learn(pulls)
        self.mail.offer(action, live)
        del self.live[key]
        self.gauge.drop(key)

    def _update(self, index: int, batch: Batch, update: int, epoch: int) -> None:
        block, sync = self.blocks[index], self.syncs[index]
        clock = Clock(update, epoch, self.course.epochs, block.lr)
        sync.before_update(block.gradients(), batch.own / batch.rows, clock)
        # Where replicas train apart, one without a sample has nothing to learn from.
        if batch.own or not sync.apart:
            block.update()
        sync.after_update(clock)

    def _finite(self) -> None:
        """Refuse weights that the segment's last updates made NaN or infinite."""
        for index, block in self.blocks.items():
            for name, tensor in block.parameters.items():
                if not torch.isfinite(tensor).all():
                    place = f"[replica {self.seat.replica} stage {self.seat.stage}]"
                    raise Refusal(f"'{name}' of block {index} is not finite {place}", NUMERIC)

    def _read(self, source: Source, indices: Indices) -> Tensor:
        x = source.inputs(indices)
        return x.to(self.course.dtype) if x.is_floating_point() else x

    @torch.no_grad()
    def predict(self, source: Source, micros: Sequence[Indices]) -> Tally:
        """Return the sums over this rank's rows of losses, of right answers and of right votes.

        Collective over all ranks of the replica; `micros` are this replica's, none of them empty.
        """
        plan = partial(forward, self.seat.stage, self.seat.place, len(micros))
        tally = Tally(rows=sum(map(len, micros)))
        for block in self.blocks.values():
            block.train(False)
        self.post.open(plan(), lambda action: len(micros[action.micro]))
        for action in plan():
            with self._at(action, "evaluation"):
                self._judge(action, source, micros[action.micro], tally)
        self.post.close()
        return tally

    def _judge(self, action: Action, source: Source, indices: Indices, tally: Tally) -> None:
        task, block = self.tasks[action.block], self.blocks[action.block]
        told = self.post.take(action)
        x = told.pop(ACTIVATION) if action.block else self._read(source, indices)
        live = Live(x, block.forward(x, ()), source.targets(indices), told=told)
        scores = self.objective.predict(task, block, live)
        if scores is not None:
            scores = scores.to(VOTE_DTYPE)
            told[VOTES] = told[VOTES] + scores if VOTES in told else scores
            tally.correct[task.block] = tally.correct.get(task.block, 0) + _right(scores, live)
            loss = torch.nn.functional.cross_entropy(scores, live.targets, reduction="sum")
            tally.add_loss(task.block, float(loss))
        if task.last:
            tally.voted += _right(told[VOTES], live)
        self.post.offer(action, live)

    def peak_bytes(self) -> int:
        """Return the most memory of this rank: tensors, gradients, optimizer, saved, messages."""
        own = [tensor for block in self.blocks.values() for tensor in block.tensors().values()]
        trained = [p for block in self.blocks.values() for p in block.trained]
        memory = [t for block in self.blocks.values() for t in block.memory().values()]
        held = sum(tensor.nbytes for tensor in [*own, *trained, *memory])
        return held + self.gauge.peak_bytes + self.lines.control.traffic.peak_held_bytes

    @contextmanager
    def _at(self, action: Action, when: str) -> Iterator[None]:
        """Add to whatever is raised inside where it was: replica, stage, update, action."""
        try:
            yield
        except BaseException as error:
            place = (
                f"[replica {self.seat.replica} stage {self.seat.stage} | {when} | action {action}]"
            )
            if isinstance(error, Refusal):
                error.at(place)
            else:
                error.add_note(place)
            raise


def _right(scores: Tensor, live: Live) -> int:
    return int((scores.argmax(1) == live.targets).sum())
