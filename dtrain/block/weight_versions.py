"""Weight versions of one block: the weights of its forwards and backwards, and stashed copies.

Invariant: outside `forward_weights` and `backward_weights` the parameters hold the present weights,
which alone are updated, averaged, saved and evaluated. No copy outlives a segment.

::

    forward    the present weights | an older version | predicted weights
    backward   the present weights | those of its forward | predicted weights
    step       copies the present version where it is needed later, then updates
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

from torch import Tensor

from dtrain.block.block import Block, OptimizerStep
from dtrain.block.saved_tensors import SavedTensors
from dtrain.block.weight_prediction import predict_weights, spike_compensated_step
from dtrain.schedules.actions import Action
from dtrain.schedules.weight_policy import VersionTracker, WeightPolicy

MicroBatchKey = tuple[int, int, int]
"""Block, update and micro-batch: `Action.key`."""


@final
class WeightVersions:
    """The weight versions of one block with updates between forward and backward.

    Parameters
    ----------
    policy : WeightPolicy
        Selects the weights of each forward and backward.
    saved_tensors : SavedTensors
        Resolves saved weights; it must know which tensors stand in for parameters.

    Attributes
    ----------
    peak_copies : int
        The most copies of the weights that were kept at once.
    """

    def __init__(self, block: Block, policy: WeightPolicy, saved_tensors: SavedTensors) -> None:
        self.block = block
        self.policy = policy
        self.saved_tensors = saved_tensors
        self.peak_copies = 0
        self.start_segment()

    def start_segment(self) -> None:
        """Start a segment, without micro-batches in flight."""
        self._older_versions: dict[int, list[Tensor]] = {}
        self._predicted_weights: dict[MicroBatchKey, list[Tensor]] = {}
        self._previous_weights: list[Tensor] | None = None
        self._tracker = VersionTracker(self.policy, self.block.index)

    @contextmanager
    def forward_weights(self, action: Action, is_last: bool) -> Iterator[None]:
        """Give the parameters the weights of a forward; `is_last`: the last one of its update."""
        tracker, weights = self._tracker, None
        if action.pass_:
            version = tracker.backward(action.key)
            weights = self._predicted_weights.get(action.key)
        else:
            version = tracker.forward(action.key, action.update, is_last)
            steps = self.policy.prediction_steps(self.block.index, action.update, "F")
            if steps:
                weights = self._predict(steps)
                if self.policy.stash:
                    self._predicted_weights[action.key] = weights
        self.peak_copies = max(self.peak_copies, tracker.peak_copies)
        if weights is None:
            weights = self._older_versions.get(
                tracker.current_version if version is None else version
            )
        with self._swap_weights(weights):
            yield

    @contextmanager
    def backward_weights(self, action: Action) -> Iterator[None]:
        """Give the parameters the weights of a backward."""
        version = self._tracker.backward(action.key)
        steps = self.policy.prediction_steps(self.block.index, action.update, "B")
        if steps:
            weights: list[Tensor] | None = self._predict(steps)
        elif version is None:
            weights = self._predicted_weights[action.key]
        else:
            weights = self._older_versions.get(version)
        with self._swap_weights(weights):
            yield

    def done(self, action: Action) -> None:
        """Free the versions that only this micro-batch needed."""
        self._tracker.release(action.key)
        self._predicted_weights.pop(action.key, None)
        self._drop_unneeded()

    def step(
        self, update: int, takes_step: bool, optimizer_step: OptimizerStep | None = None
    ) -> None:
        """Advance to the next version.

        Parameters
        ----------
        update : int
            Counted from the start of the segment.
        takes_step : bool
            Whether the block takes an optimizer step at all.
        optimizer_step : callable, optional
            Replaces the optimizer's own step, unless it is spike-compensated.
        """
        policy, tracker, block = self.policy, self._tracker, self.block
        version = tracker.current_version
        if tracker.update():
            self._older_versions[version] = self._copy_weights()
        if policy.prediction == "difference":
            self._previous_weights = self._older_versions.get(version) or self._copy_weights()
        self._drop_unneeded()
        self.peak_copies = max(self.peak_copies, tracker.peak_copies)
        delay = policy.delay(block.index, update) if policy.spike_compensation else 0
        if takes_step and delay:
            block.update(lambda optimizer: spike_compensated_step(optimizer, delay))
        elif takes_step:
            block.update(optimizer_step)

    @property
    def peak_bytes(self) -> int:
        """The most bytes of copies that were kept at once."""
        return self.peak_copies * sum(
            parameter.nbytes for parameter in self.block.trainable_parameters
        )

    def _predict(self, steps: float) -> list[Tensor]:
        block = self.block
        assert block.optimizer is not None
        return predict_weights(
            self.policy.prediction,
            block.optimizer,
            block.trainable_parameters,
            steps,
            self._previous_weights,
        )

    def _copy_weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.block.trainable_parameters]

    def _drop_unneeded(self) -> None:
        for version in self._older_versions.keys() - self._tracker.old_versions:
            del self._older_versions[version]

    @contextmanager
    def _swap_weights(self, replacements: Sequence[Tensor] | None) -> Iterator[None]:
        """Give the parameters the memory of `replacements` while the body runs."""
        if replacements is None:
            yield
            return
        own_data = [(parameter, parameter.data) for parameter in self.block.trainable_parameters]
        try:
            for (parameter, _), weights in zip(own_data, replacements, strict=True):
                parameter.data = weights
                self.saved_tensors.register_stand_in(weights, parameter)
            yield
        finally:
            for (parameter, data), weights in zip(own_data, replacements, strict=True):
                parameter.data = data
                self.saved_tensors.unregister_stand_in(weights)
