"""Evaluator: the forward of all blocks over a test split, their scores and the vote.

Invariant: no parameter and no buffer changes; only messages of the "predict" routes are sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch, RowRandom
from dtrain.comm.groups import ProcessGroups
from dtrain.data.reading.loader import Loader
from dtrain.data.sampler import Indices
from dtrain.engine.metrics import MetricSums
from dtrain.engine.router import MessageRouter
from dtrain.engine.spec import EngineSpec
from dtrain.mesh import RankPosition
from dtrain.objectives.base import VOTE_DTYPE, VOTES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.forward import forward_micro_batch
from dtrain.objectives.messages import reads_samples
from dtrain.schedules.actions import Action
from dtrain.schedules.base import evaluation_plan


class Prediction(NamedTuple):
    """The prediction of one block for one micro-batch.

    Attributes
    ----------
    output, scores : Tensor or None
        The block's prediction (rows, ...), and the same in float64; None where it has none.
    votes : Tensor
        The sum of the scores of this block and those before it.
    """

    spec: BlockSpec
    output: Tensor | None
    scores: Tensor | None
    votes: Tensor
    targets: Tensor


class Evaluator:
    """Predicts with one rank's blocks.

    Parameters
    ----------
    position : RankPosition
        This rank's coordinates on the mesh.
    groups : ProcessGroups
        Its communicators.
    blocks : dict of int to Block
        Its blocks, by index.
    engine_spec : EngineSpec
        The training settings; its objective predicts.
    """

    def __init__(
        self,
        position: RankPosition,
        groups: ProcessGroups,
        blocks: dict[int, Block],
        engine_spec: EngineSpec,
    ) -> None:
        self.position = position
        self.blocks = blocks
        self.engine_spec = engine_spec
        self.router = MessageRouter(
            "predict", engine_spec.objective, engine_spec.block_specs, position, groups
        )
        self._flight = groups.control.flight
        self.needs_samples = {
            b
            for b in blocks
            if reads_samples(engine_spec.objective, engine_spec.block_specs[b], "predict")
        }

    @torch.no_grad()
    def evaluate(self, loader: Loader, index_batches: Sequence[Indices]) -> list[MetricSums]:
        """Return the sums of losses, right predictions and metrics by micro-batch.

        Collective over all ranks of the replica.

        Parameters
        ----------
        index_batches : sequence of arrays
            The samples of this replica's micro-batches, none of them empty.
        """
        metric_sums = [MetricSums(rows=len(indices)) for indices in index_batches]
        for micro, prediction in self._predictions(loader, index_batches):
            self._measure(prediction, metric_sums[micro])
        return metric_sums

    @torch.no_grad()
    def predict(self, loader: Loader, index_batches: Sequence[Indices]) -> list[Tensor]:
        """Return the model's prediction (rows, ...) of each micro-batch, on the rank of the last
        block; elsewhere none. Collective over all ranks of the replica.

        It is the output of the last block, in float64 the sum of all blocks' scores where the
        objective predicts by vote.
        """
        outputs = []
        for _, prediction in self._predictions(loader, index_batches):
            if prediction.spec.is_last:
                output = prediction.votes if self._predicts_by_vote else prediction.output
                assert output is not None
                outputs.append(output.cpu())
        return outputs

    def _predictions(
        self, loader: Loader, index_batches: Sequence[Indices]
    ) -> Iterator[tuple[int, Prediction]]:
        """Run the forwards of this rank; yield what each block predicts for each micro-batch."""
        count = len(index_batches)
        plan = list(evaluation_plan(self.position.stage, self.position.place, count))
        for block in self.blocks.values():
            block.train(False)
        self.router.open(plan, [count], lambda _, micro: len(index_batches[micro]))
        loader.open(
            (index_batches[action.micro] for action in plan if action.block in self.needs_samples),
            epoch=0,
        )
        try:
            for action in plan:
                self._flight.note("predict", action)
                with self.position.error_context(action, "evaluation"):
                    yield action.micro, self._predict(action, loader, index_batches[action.micro])
        finally:
            loader.close()
        self.router.close()

    def _predict(self, action: Action, loader: Loader, indices: Indices) -> Prediction:
        """Run the forward of a block and send its output and the votes."""
        objective, block = self.engine_spec.objective, self.blocks[action.block]
        spec, device = self.engine_spec.block_specs[action.block], self.engine_spec.device
        targets, received = loader.dataset.targets(indices).to(device), self.router.receive(action)
        task = self.engine_spec.task
        samples = torch.from_numpy(indices)
        random = RowRandom.of_samples(self.engine_spec.seed, action.block, samples)
        micro_batch = MicroBatch(targets=targets, task=task, received=received, row_random=random)
        if action.block in self.needs_samples:
            micro_batch.samples = loader.read().to(device)
            others = loader.read_other_inputs(indices)
            micro_batch.other_samples = tuple(x.to(device) for x in others)
        forward_micro_batch(objective, spec, block, micro_batch)
        output = objective.predict(spec, block, micro_batch)
        scores = None if output is None else output.to(VOTE_DTYPE)
        if scores is not None and task.has_classes:  # the sum of other predictions means nothing
            vote = objective.vote(spec, scores)
            received[VOTES] = received[VOTES] + vote if VOTES in received else vote
        if VOTES not in received:
            received[VOTES] = torch.zeros(len(targets), *spec.scores_shape, dtype=VOTE_DTYPE)
        self.router.send(action, block, micro_batch)
        return Prediction(spec, output, scores, received[VOTES], targets)

    def _measure(self, prediction: Prediction, metric_sums: MetricSums) -> None:
        """Add loss and metrics of what a block predicts."""
        spec, _, scores, votes, targets = prediction
        if scores is not None:
            self._add_prediction(spec, scores, targets, metric_sums)
        if spec.is_last and self.engine_spec.task.has_classes:
            self._add_vote(votes, targets, metric_sums)

    def _add_prediction(
        self, spec: BlockSpec, scores: Tensor, targets: Tensor, metric_sums: MetricSums
    ) -> None:
        """Add the loss and the right predictions of a block; of the last one the metrics, too."""
        task = self.engine_spec.task
        loss, weight = task.loss_sum(scores, targets)
        metric_sums.add_loss(spec.index, loss, weight)
        if task.has_classes:
            correct, _ = task.correct(scores, targets)
            metric_sums.correct[spec.index] = metric_sums.correct.get(spec.index, 0) + correct
        if spec.is_last and not self._predicts_by_vote:
            metric_sums.loss_weight = weight
            metric_sums.task_metrics = task.measure(scores, targets)

    def _add_vote(self, vote: Tensor, targets: Tensor, metric_sums: MetricSums) -> None:
        """Add the loss and the right predictions of the vote; if it is the model's prediction, the
        metrics, too."""
        task = self.engine_spec.task
        loss, metric_sums.loss_weight = task.loss_sum(vote, targets)
        correct, metric_sums.positions = task.correct(vote, targets)
        metric_sums.vote_loss += loss
        metric_sums.vote_correct += correct
        if self._predicts_by_vote:
            metric_sums.task_metrics = task.measure(vote, targets)

    @property
    def _predicts_by_vote(self) -> bool:
        return self.engine_spec.objective.predicts_by_vote and self.engine_spec.task.has_classes
