"""Versions: the weights that one block shows while it computes, and those that it keeps for it.

Invariant: outside `forward` and `backward` the parameters hold the present weights, which alone are
updated, averaged, saved and evaluated; nothing is kept beyond a segment.

::

    forward    parameters hold: the present weights | an older version | foretold ones
    backward   the present weights | those of its forward | foretold ones
    step       keeps a copy of the present version where somebody needs it, then moves on
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
    """One block's weights through a segment.

    Parameters
    ----------
    block : Block
        Whose weights they are.
    policy : Policy or None
        With which weights it computes; None: no update comes between forward and learning.
    saved : Saved
        Told which tensors stand in for parameters.
    """

    def __init__(self, block: Block, policy: WeightPolicy, saved_tensors: SavedTensors) -> None:
        self.block, self.policy, self.saved_tensors = block, policy, saved_tensors
        self.peak_copies = 0
        self.start_segment()

    def start_segment(self) -> None:
        """Start a segment; the one before has left nothing in flight."""
        self._older_versions: dict[int, list[Tensor]] = {}
        self._predicted_weights: dict[MicroBatchKey, list[Tensor]] = {}
        self._previous_weights: list[Tensor] | None = None
        self._tracker = VersionTracker(self.policy, self.block.index)

    @contextmanager
    def forward_weights(self, action: Action, is_last: bool) -> Iterator[None]:
        """Hold the weights of a forward; `last` says whether it is its update's last one."""
        policy, tracker, key = self.policy, self._tracker, action.key
        if action.pass_:
            shown = self._predicted_weights.get(key)
            version = tracker.backward(key)
        else:
            version, shown = tracker.forward(key, action.update, is_last), None
            steps = policy.prediction_steps(self.block.index, action.update, "F")
            if steps:
                shown = self._predict(steps)
                if policy.stash:
                    self._predicted_weights[key] = shown
        self.peak_copies = max(self.peak_copies, tracker.peak_copies)
        with self._swap_weights(
            shown
            or self._older_versions.get(tracker.current_version if version is None else version)
        ):
            yield

    @contextmanager
    def backward_weights(self, action: Action) -> Iterator[None]:
        """Hold the weights of a backward."""
        policy, tracker, key = self.policy, self._tracker, action.key
        version = tracker.backward(key)
        shown = (
            self._predicted_weights[key] if version is None else self._older_versions.get(version)
        )
        steps = policy.prediction_steps(self.block.index, action.update, "B")
        with self._swap_weights(self._predict(steps) if steps else shown):
            yield

    def done(self, action: Action) -> None:
        """Let go of what only this micro-batch needed."""
        self._tracker.release(action.key)
        self._predicted_weights.pop(action.key, None)
        self._drop_unneeded()

    def step(
        self, update: int, takes_step: bool, optimizer_step: OptimizerStep | None = None
    ) -> None:
        """Go on to the next version: update the block, where it `moves` at all, by a `rule` if
        one is given."""
        policy, tracker, block = self.policy, self._tracker, self.block
        now = tracker.current_version
        if tracker.update():
            self._older_versions[now] = self._copy_weights()
        if policy.prediction == "difference":
            self._previous_weights = self._older_versions.get(now) or self._copy_weights()
        self._drop_unneeded()
        self.peak_copies = max(self.peak_copies, tracker.peak_copies)
        delay = policy.delay(block.index, update) if policy.spike_compensation else 0
        if takes_step and delay:
            block.update(lambda optimizer: spike_compensated_step(optimizer, delay))
        elif takes_step:
            block.update(optimizer_step)

    @property
    def peak_bytes(self) -> int:
        """The most bytes of copies so far."""
        return self.peak_copies * sum(
            parameter.nbytes for parameter in self.block.trainable_parameters
        )

    def _predict(self, steps: float) -> list[Tensor]:
        assert self.block.optimizer is not None
        return predict_weights(
            self.policy.prediction, self.block.optimizer, steps, self._previous_weights
        )

    def _copy_weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.block.trainable_parameters]

    def _drop_unneeded(self) -> None:
        for version in self._older_versions.keys() - self._tracker.old_versions:
            del self._older_versions[version]

    @contextmanager
    def _swap_weights(self, replacements: Sequence[Tensor] | None) -> Iterator[None]:
        """Let the parameters hold the memory of others while the body runs."""
        if replacements is None:
            yield
            return
        own = [(parameter, parameter.data) for parameter in self.block.trainable_parameters]
        try:
            for (parameter, _), other in zip(own, replacements, strict=True):
                parameter.data = other
                self.saved_tensors.register_stand_in(other, parameter)
            yield
        finally:
            for (parameter, data), other in zip(own, replacements, strict=True):
                parameter.data = data
                self.saved_tensors.unregister_stand_in(other)
