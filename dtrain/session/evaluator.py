"""Evaluator: the weights that are tested and saved, and their tests."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from dtrain.build import RankJob
from dtrain.callbacks import Ema
from dtrain.checkpoint.digest import model_digest
from dtrain.comm.communicator import Comm
from dtrain.evaluation import EvalWeights, evaluate_weights, evaluation_weights
from dtrain.monitoring.metric_values import rename_evaluation
from dtrain.session.data_notes import check_data_values

SEARCH_S = 60.0
"""Seconds in which a test loss that is not finite is searched for in the data, once."""


@final
class Evaluator:
    """The weights of this rank's blocks as the syncs evaluate them. Methods are collective.

    Parameters
    ----------
    job : RankJob
        The engine of this rank.
    ema : Ema or None
        The averaged weights.
    comm : Comm
        All ranks.
    """

    def __init__(self, job: RankJob, ema: Ema | None, comm: Comm) -> None:
        self._job = job
        self._ema = ema
        self._comm = comm
        self._weights: EvalWeights | None = None
        self._searched_data = False

    def forget(self) -> None:
        """The blocks are trained on: compute the weights anew when they are needed."""
        self._weights = None

    def weights(self) -> EvalWeights:
        """Return the evaluation weights of the syncs, computed once between two segments."""
        if self._weights is None:
            self._weights = evaluation_weights(self._job)
        return self._weights

    def tensors(self) -> dict[str, Tensor]:
        """Return the evaluation weights by name, on replica 0; nothing on other replicas."""
        weights = self.weights()
        if self._job.position.replica:
            return {}
        return {name: tensor for tensors in weights.values() for name, tensor in tensors.items()}

    def test(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Test the weights, and the averaged ones where they are evaluated.

        Returns
        -------
        dict
            The evaluation of the test split.
        dict
            Further values: of the validation split, and of averaged weights with ``ema_``.
        """
        test, others = self._test(self.weights())
        if test["test_loss"] is None and not self._searched_data:
            self._searched_data = True
            check_data_values(self._job.plan, self._comm, SEARCH_S)
        if self._ema is not None and self._ema.evaluate:
            averaged, more = self._test(self._ema_weights(self._ema))
            more |= rename_evaluation(averaged, "test")
            others |= {f"ema_{key}": value for key, value in more.items()}
        return test, others

    def _test(self, weights: EvalWeights) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the evaluation of the test split, and that of the validation split if any."""
        job, splitter = self._job, self._job.plan.batch_splitter
        validation = {}
        if job.validation_loader is not None:
            metrics = evaluate_weights(job, weights, job.validation_loader, splitter)
            validation = rename_evaluation(metrics, "validation")
        return evaluate_weights(job, weights, job.test_loader, splitter), validation

    def _ema_weights(self, ema: Ema) -> EvalWeights:
        """Return the averaged weights, with the buffers and frozen parameters of the model."""
        weights = self.weights()
        return {index: {**weights[index], **ema.weights(index)} for index in weights}

    def digest(self) -> str:
        """Return the SHA-256 of the evaluated model."""
        return model_digest(self.tensors(), self._job.groups.control)
