"""Policy: with which weights a block computes where updates come between forward and learning.

Invariant: pure, and said in updates of the block since the segment's start, so that it is the same
on any number of ranks; the tensors are the business of `dtrain.versions`.

::

    forward of update u     version u - D      plain: the weights that it meets
                            version u - lag    fixed: older ones (vertical sync, double buffering)
                            w(u - D) + T x     predicted, T updates ahead
    backward of update u    version u          current; with a prediction of its own: SpecTrain
                            what its forward used                             stashed
    update u                spread over what was missed                       spike compensation
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from dtrain.schedules.actions import Action

Prediction = Literal["none", "velocity", "difference", "coasting", "optimizer", "spectrain"]


class Delay(NamedTuple):
    """How late a block learns, in updates of its own, where each has one micro-batch.

    Attributes
    ----------
    delay : int
        Updates from the forward of a micro-batch to its own update (D), once the pipeline is full:
        update u of a segment is min(u, D) late.
    gap : int
        Updates that begin from there on until the first block learns the micro-batch.
    """

    updates: int
    first_block_gap: int


@final
@dataclass(frozen=True)
class WeightPolicy:
    """With which weights the blocks compute.

    Attributes
    ----------
    lateness : tuple of Lateness
        How late each block learns.
    stash : bool
        Whether a backward uses the weights that its forward used, else those of its own moment.
    lag : int or None
        The version of an update's forwards: so many updates before it; None: the one they meet.
    prediction : str
        How the weights of a forward are foretold.
    horizon : float
        How far: in delays of the block (T / D).
    spikes : bool
        Whether late gradients are compensated when they are applied.
    """

    delays: tuple[Delay, ...]
    stash: bool = False
    lag: int | None = None
    prediction: Prediction = "none"
    horizon: float = 1.0
    spike_compensation: bool = False

    def delay(self, block: int, update: int) -> int:
        """Return how many updates of a block update `update` of the segment is late."""
        return min(update, self.delays[block].updates)

    def prediction_steps(self, block: int, update: int, kind: Literal["F", "B"]) -> float:
        """Return for how many updates the weights of a forward or a backward are foretold."""
        whole = self.prediction == "spectrain"
        if self.prediction == "none" or (kind == "B" and not whole):
            return 0.0
        gap = self.delays[block].first_block_gap if whole else 0
        return self.horizon * ((self.delay(block, update) if kind == "F" else 0) + gap)


@final
class VersionTracker:
    """Which versions of one block's weights are kept, by number; version v is after v updates.

    Attributes
    ----------
    now : int
        The present version.
    kept : set of int
        Older versions that are still needed.
    most : int
        The most copies so far: of older versions, of foretold weights, and of those of one update
        before, where weights are foretold from them.
    """

    def __init__(self, policy: WeightPolicy, block: int) -> None:
        self._policy, self._block = policy, block
        self.current_version = self._oldest_needed = self.peak_copies = 0
        self.old_versions: set[int] = set()
        self._previous_versions: set[int] = set()
        self._stashed_versions: dict[Hashable, int] = {}
        self._predicted_keys: set[Hashable] = set()

    def forward(self, key: Hashable, update: int, is_last: bool) -> int:
        """Return the version of a forward; `last` says whether no micro-batch of it follows."""
        policy = self._policy
        version = self.current_version if policy.lag is None else max(0, update - policy.lag)
        assert version == self.current_version or version in self.old_versions, (
            "a version was dropped too early"
        )
        self._oldest_needed = self._oldest_forward_version(update + is_last)
        foretold = policy.prediction_steps(self._block, update, "F") > 0
        if policy.stash and foretold:
            self._predicted_keys.add(key)
        elif policy.stash:
            self._stashed_versions[key] = version
        self._count_copies(foretold and not policy.stash)
        return version

    def backward(self, key: Hashable) -> int | None:
        """Return the version of a backward, None for what was stashed as it was foretold."""
        if key in self._predicted_keys:
            return None
        return self._stashed_versions.get(key, self.current_version)

    def release(self, key: Hashable) -> None:
        """Forget a micro-batch, and versions that only it needed."""
        self._predicted_keys.discard(key)
        self._stashed_versions.pop(key, None)
        self._drop()

    def update(self) -> bool:
        """Go on to the next version; return whether the present one has to be kept."""
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
        """Return the oldest version that forwards from an update on will ask for."""
        lag = self._policy.lag
        return max(0, update - lag) if lag is not None else update + 1

    def _drop(self) -> None:
        wanted = set(self._stashed_versions.values())
        self.old_versions = {
            v for v in self.old_versions if v in wanted or v >= self._oldest_needed
        }

    def _count_copies(self, temporary: bool = False) -> None:
        """Count copies; a foretold one that is not stashed lasts for its forward."""
        now = (
            len(self.old_versions | self._previous_versions) + len(self._predicted_keys) + temporary
        )
        self.peak_copies = max(self.peak_copies, now)


def peak_weight_copies(actions: Sequence[Action], policy: WeightPolicy | None) -> dict[int, int]:
    """Return by block the most copies of its weights that one rank's actions keep at once."""
    if policy is None:
        return {}
    lasts = {(a.block, a.update): a.micro for a in actions if a.kind == "F" and not a.pass_}
    shelves: dict[int, VersionTracker] = {}
    for action in actions:
        shelf = shelves.setdefault(action.block, VersionTracker(policy, action.block))
        key = action.update, action.micro
        match action.kind:
            case "F" if not action.pass_:
                last = lasts[action.block, action.update] == action.micro
                shelf.forward(key, action.update, last)
            case "B" | "W":
                shelf.release(key)
            case "U":
                shelf.update()
    return {block: shelf.peak_copies for block, shelf in shelves.items()}
