"""Evaluation: the forward of every block over a test split, its scores and the vote.

Invariant: nothing is learnt and no buffer moves; only rows of the "predict" routes travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.comm.groups import ProcessGroups
from dtrain.data.loader import Loader
from dtrain.data.sampler import Indices
from dtrain.engine.metrics import MetricSums
from dtrain.engine.router import MessageRouter
from dtrain.engine.spec import EngineSpec
from dtrain.mesh import RankPosition
from dtrain.objectives.base import VOTE_DTYPE, VOTES
from dtrain.objectives.forward import forward_micro_batch
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
        objective, block = self.engine_spec.objective, self.blocks[action.block]
        spec, device = self.engine_spec.block_specs[action.block], self.engine_spec.device
        targets, received = loader.dataset.targets(indices).to(device), self.router.receive(action)
        samples = loader.read().to(device) if action.block in self.needs_samples else None
        micro_batch = MicroBatch(targets=targets, received=received, samples=samples)
        forward_micro_batch(objective, spec, block, micro_batch)
        scores = objective.predict(spec, block, micro_batch)
        if scores is not None:
            scores = scores.to(VOTE_DTYPE)
            vote = objective.vote(spec, scores)
            received[VOTES] = received[VOTES] + vote if VOTES in received else vote
            correct = _correct_count(scores, targets)
            metric_sums.correct[spec.index] = metric_sums.correct.get(spec.index, 0) + correct
            metric_sums.add_loss(spec.index, _loss(scores, targets))
        elif VOTES not in received:
            received[VOTES] = torch.zeros(len(targets), spec.classes, dtype=VOTE_DTYPE)
        if spec.is_last:
            metric_sums.vote_correct += _correct_count(received[VOTES], targets)
            metric_sums.vote_loss += _loss(received[VOTES], targets)
        self.router.send(action, block, micro_batch)


def _loss(scores: Tensor, targets: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))


def _correct_count(scores: Tensor, targets: Tensor) -> int:
    return int((scores.argmax(1) == targets).sum())
