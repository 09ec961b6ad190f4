"""Weight policies: which weight versions an asynchronous schedule computes with.

Invariant: a policy counts updates of a block since the start of the segment, so it is the same on
any number of ranks. The tensors are in `dtrain.block.weight_versions`.

::

    forward of update u     version u - D      the current weights
                            version u - lag    a fixed lag (vertical sync, double buffering)
                            w(u - D) + T x     predicted, T updates ahead
    backward of update u    version u          the current weights; SpecTrain predicts them too
                            version of the forward                        (weight stashing)
    update u                the sum of all movements that it missed       (spike compensation)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from dtrain.schedules.actions import Action

Prediction = Literal["none", "velocity", "difference", "coasting", "optimizer", "spectrain"]


class Delay(NamedTuple):
    """Delay of a block in updates of its own, with one micro-batch per update.

    Attributes
    ----------
    updates : int
        Updates from the forward of a micro-batch to its own update (D), once the pipeline is full;
        update u of a segment is min(u, D) late.
    first_block_gap : int
        Updates that begin between the backward of a micro-batch in this block and in the first.
    """

    updates: int
    first_block_gap: int


@final
@dataclass(frozen=True)
class WeightPolicy:
    """Weight versions with which the blocks compute.

    Attributes
    ----------
    delays : tuple of Delay
        One per block.
    stash : bool
        Whether a backward uses the weights of its forward; otherwise the current weights.
    lag : int or None
        Forwards of update u use version u - lag; None: the current weights.
    prediction : str
        How the weights of a forward are predicted.
    horizon : float
        How far they are predicted: T / D, in delays of the block.
    spike_compensation : bool
        Whether delayed gradients are compensated when they are applied.
    """

    delays: tuple[Delay, ...]
    stash: bool = False
    lag: int | None = None
    prediction: Prediction = "none"
    horizon: float = 1.0
    spike_compensation: bool = False

    def delay(self, block: int, update: int) -> int:
        """Return by how many updates of a block update `update` of the segment is late."""
        return min(update, self.delays[block].updates)

    def prediction_steps(self, block: int, update: int, kind: Literal["F", "B"]) -> float:
        """Return how many updates ahead the weights of a forward or a backward are predicted."""
        spectrain = self.prediction == "spectrain"
        if self.prediction == "none" or (kind == "B" and not spectrain):
            return 0.0
        gap = self.delays[block].first_block_gap if spectrain else 0
        return self.horizon * ((self.delay(block, update) if kind == "F" else 0) + gap)


@final
class VersionTracker:
    """Count which versions of one block's weights must be kept; version v is after v updates.

    Attributes
    ----------
    current_version : int
        Version of the current weights.
    old_versions : set of int
        Older versions that are still needed.
    peak_copies : int
        Most copies so far: older versions, predicted weights, and the weights of one update before
        where the prediction needs them ("difference").
    """

    def __init__(self, policy: WeightPolicy, block: int) -> None:
        self._policy = policy
        self._block = block
        self.current_version = 0
        self.peak_copies = 0
        self.old_versions: set[int] = set()
        self._oldest_needed = 0
        self._previous_versions: set[int] = set()
        self._stashed_versions: dict[Hashable, int] = {}
        self._predicted_keys: set[Hashable] = set()

    def forward(self, key: Hashable, update: int, is_last: bool) -> int:
        """Return the version of a forward; `is_last`: it is the last micro-batch of its update."""
        policy = self._policy
        version = self.current_version if policy.lag is None else max(0, update - policy.lag)
        assert version == self.current_version or version in self.old_versions, (
            "a version was dropped too early"
        )
        self._oldest_needed = self._oldest_forward_version(update + is_last)
        predicts = policy.prediction_steps(self._block, update, "F") > 0
        if policy.stash and predicts:
            self._predicted_keys.add(key)
        elif policy.stash:
            self._stashed_versions[key] = version
        self._count_copies(temporary=predicts and not policy.stash)
        return version

    def backward(self, key: Hashable) -> int | None:
        """Return the version of a backward; None: the stashed predicted weights of its forward."""
        if key in self._predicted_keys:
            return None
        return self._stashed_versions.get(key, self.current_version)

    def release(self, key: Hashable) -> None:
        """Drop a micro-batch and the versions that only it needed."""
        self._predicted_keys.discard(key)
        self._stashed_versions.pop(key, None)
        self._drop()

    def update(self) -> bool:
        """Advance to the next version; return whether a copy of the current one must be kept."""
        keeps = (
            self.current_version in self._stashed_versions.values()
            or self._oldest_needed <= self.current_version
        )
        if keeps:
            self.old_versions.add(self.current_version)
        if self._policy.prediction == "difference":
            self._previous_versions = {self.current_version}
        self.current_version += 1
        self._drop()
        self._count_copies()
        return keeps

    def _oldest_forward_version(self, update: int) -> int:
        """Return the oldest version that forwards from an update on will use."""
        lag = self._policy.lag
        return max(0, update - lag) if lag is not None else update + 1

    def _drop(self) -> None:
        stashed = set(self._stashed_versions.values())
        self.old_versions = {
            v for v in self.old_versions if v in stashed or v >= self._oldest_needed
        }

    def _count_copies(self, temporary: bool = False) -> None:
        """Raise the peak; `temporary`: a predicted copy exists during its forward only."""
        versions = self.old_versions | self._previous_versions
        copies = len(versions) + len(self._predicted_keys) + temporary
        self.peak_copies = max(self.peak_copies, copies)


def peak_weight_copies(actions: Sequence[Action], policy: WeightPolicy | None) -> dict[int, int]:
    """Return by block the most weight copies that one rank's actions need at once."""
    if policy is None:
        return {}
    last_micros = {(a.block, a.update): a.micro for a in actions if a.kind == "F" and not a.pass_}
    trackers: dict[int, VersionTracker] = {}
    for action in actions:
        tracker = trackers.setdefault(action.block, VersionTracker(policy, action.block))
        match action.kind:
            case "F" if not action.pass_:
                is_last = last_micros[action.block, action.update] == action.micro
                tracker.forward(action.key, action.update, is_last)
            case "B" | "W":
                tracker.release(action.key)
            case "U":
                tracker.update()
    return {block: tracker.peak_copies for block, tracker in trackers.items()}
