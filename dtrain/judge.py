"""Evaluation: the forward of every block over a test split, its scores and the vote.

Invariant: nothing is learnt and no buffer moves; only rows of the "predict" routes travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dtrain.block import Block
from dtrain.course import Course
from dtrain.data.batches import Indices
from dtrain.data.reader import Reader
from dtrain.live import Given, Live
from dtrain.mail import Lines, Mail, Seat
from dtrain.objectives.objective import VOTE_DTYPE, VOTES
from dtrain.schedules.action import Action
from dtrain.schedules.schedule import forward
from dtrain.tally import Tally


class Judge:
    """Predicts with one rank's blocks.

    Parameters
    ----------
    seat, lines : Seat, Lines
        This rank's place, and its communicators.
    blocks : dict of int to Block
        What it holds.
    course : Course
        Whose objective predicts.
    """

    def __init__(self, seat: Seat, lines: Lines, blocks: dict[int, Block], course: Course) -> None:
        self.seat, self.blocks, self.course = seat, blocks, course
        self.mail = Mail("predict", course.objective, course.tasks, seat, lines)
        self.readers = {b for b in blocks if course.objective.reads(course.tasks[b], "predict")}

    @torch.no_grad()
    def predict(self, reader: Reader, micros: Sequence[Indices]) -> list[Tally]:
        """Return the sums over each micro-batch of losses, of right answers and of right votes.

        Collective over all ranks of the replica; `micros` are this replica's, none of them empty.
        """
        plan = partial(forward, self.seat.stage, self.seat.place, len(micros))
        tallies = [Tally(rows=len(micro)) for micro in micros]
        for block in self.blocks.values():
            block.train(False)
        self.mail.open(plan(), [len(micros)], lambda _, micro: len(micros[micro]))
        reader.open((micros[a.micro] for a in plan() if a.block in self.readers), epoch=0)
        try:
            for action in plan():
                with self.seat.at(action, "evaluation"):
                    self._judge(action, reader, micros[action.micro], tallies[action.micro])
        finally:
            reader.close()
        self.mail.close()
        return tallies

    def _judge(self, action: Action, reader: Reader, indices: Indices, tally: Tally) -> None:
        course, block = self.course, self.blocks[action.block]
        task, device = course.tasks[action.block], course.device
        targets, told = reader.source.targets(indices).to(device), self.mail.take(action)
        sample = reader.read().to(device) if action.block in self.readers else None
        given = Given(targets, told, sample)
        x = block.owned(course.objective.feed(task, block, given), sample)
        live = Live(**block.run(x, (), False), targets=targets, told=told, sample=sample)
        scores = course.objective.predict(task, block, live)
        if scores is not None:
            scores = scores.to(VOTE_DTYPE)
            vote = course.objective.vote(task, scores)
            live.told[VOTES] = told[VOTES] + vote if VOTES in told else vote
            tally.correct[task.block] = tally.correct.get(task.block, 0) + _right(scores, live)
            tally.add_loss(task.block, _loss(scores, targets))
        elif VOTES not in told:
            live.told[VOTES] = torch.zeros(len(targets), task.classes, dtype=VOTE_DTYPE)
        if task.last:
            tally.voted += _right(live.told[VOTES], live)
            tally.voted_loss += _loss(live.told[VOTES], targets)
        self.mail.offer(action, block, live)


def _loss(scores: Tensor, targets: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))


def _right(scores: Tensor, live: Live) -> int:
    return int((scores.argmax(1) == live.targets).sum())
