"""Evaluation: the forward of every block over a test split, its scores and the vote.

Invariant: nothing is learnt and no buffer moves; only rows of the "predict" routes travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.micro_batch import Given, MicroBatch
from dtrain.comm.groups import ProcessGroups
from dtrain.data.loader import Loader
from dtrain.data.sampler import Indices
from dtrain.engine.metrics import MetricSums
from dtrain.engine.router import MessageRouter
from dtrain.engine.spec import EngineSpec
from dtrain.mesh import RankPosition
from dtrain.objectives.base import VOTE_DTYPE, VOTES
from dtrain.schedules.actions import Action
from dtrain.schedules.base import evaluation_plan


class Evaluator:
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

    def __init__(
        self,
        position: RankPosition,
        groups: ProcessGroups,
        blocks: dict[int, Block],
        engine_spec: EngineSpec,
    ) -> None:
        self.position, self.blocks, self.engine_spec = position, blocks, engine_spec
        self.router = MessageRouter(
            "predict", engine_spec.objective, engine_spec.block_specs, position, groups
        )
        self.needs_samples = {
            b
            for b in blocks
            if engine_spec.objective.needs_samples(engine_spec.block_specs[b], "predict")
        }

    @torch.no_grad()
    def evaluate(self, loader: Loader, micros: Sequence[Indices]) -> list[MetricSums]:
        """Return the sums over each micro-batch of losses, of right answers and of right votes.

        Collective over all ranks of the replica; `micros` are this replica's, none of them empty.
        """
        plan = partial(evaluation_plan, self.position.stage, self.position.place, len(micros))
        tallies = [MetricSums(rows=len(micro)) for micro in micros]
        for block in self.blocks.values():
            block.train(False)
        self.router.open(plan(), [len(micros)], lambda _, micro: len(micros[micro]))
        loader.open((micros[a.micro] for a in plan() if a.block in self.needs_samples), epoch=0)
        try:
            for action in plan():
                with self.position.error_context(action, "evaluation"):
                    self._evaluate_action(
                        action, loader, micros[action.micro], tallies[action.micro]
                    )
        finally:
            loader.close()
        self.router.close()
        return tallies

    def _evaluate_action(
        self, action: Action, loader: Loader, indices: Indices, metric_sums: MetricSums
    ) -> None:
        course, block = self.engine_spec, self.blocks[action.block]
        task, device = course.block_specs[action.block], course.device
        targets, told = loader.dataset.targets(indices).to(device), self.router.receive(action)
        sample = loader.read().to(device) if action.block in self.needs_samples else None
        given = Given(targets, told, sample)
        x = block.writable_input(course.objective.make_input(task, block, given), sample)
        live = MicroBatch(
            **block.run_forward(x, (), False), targets=targets, received=told, samples=sample
        )
        scores = course.objective.predict(task, block, live)
        if scores is not None:
            scores = scores.to(VOTE_DTYPE)
            vote = course.objective.vote(task, scores)
            live.received[VOTES] = told[VOTES] + vote if VOTES in told else vote
            metric_sums.correct[task.index] = metric_sums.correct.get(
                task.index, 0
            ) + _correct_count(scores, live)
            metric_sums.add_loss(task.index, _loss(scores, targets))
        elif VOTES not in told:
            live.received[VOTES] = torch.zeros(len(targets), task.classes, dtype=VOTE_DTYPE)
        if task.is_last:
            metric_sums.vote_correct += _correct_count(live.received[VOTES], live)
            metric_sums.vote_loss += _loss(live.received[VOTES], targets)
        self.router.send(action, block, live)


def _loss(scores: Tensor, targets: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))


def _correct_count(scores: Tensor, micro_batch: MicroBatch) -> int:
    return int((scores.argmax(1) == micro_batch.targets).sum())
