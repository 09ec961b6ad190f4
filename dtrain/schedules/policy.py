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

from dtrain.schedules.action import Action

Prediction = Literal["none", "velocity", "difference", "coasting", "optimizer", "spectrain"]


class Lateness(NamedTuple):
    """How late a block learns, in updates of its own, where each has one micro-batch.

    Attributes
    ----------
    delay : int
        Updates from the forward of a micro-batch to its own update (D), once the pipeline is full:
        update u of a segment is min(u, D) late.
    gap : int
        Updates that begin from there on until the first block learns the micro-batch.
    """

    delay: int
    gap: int


@final
@dataclass(frozen=True)
class Policy:
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

    lateness: tuple[Lateness, ...]
    stash: bool = False
    lag: int | None = None
    prediction: Prediction = "none"
    horizon: float = 1.0
    spikes: bool = False

    def delay(self, block: int, update: int) -> int:
        """Return how many updates of a block update `update` of the segment is late."""
        return min(update, self.lateness[block].delay)

    def ahead(self, block: int, update: int, kind: Literal["F", "B"]) -> float:
        """Return for how many updates the weights of a forward or a backward are foretold."""
        whole = self.prediction == "spectrain"
        if self.prediction == "none" or (kind == "B" and not whole):
            return 0.0
        gap = self.lateness[block].gap if whole else 0
        return self.horizon * ((self.delay(block, update) if kind == "F" else 0) + gap)


@final
class Shelf:
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

    def __init__(self, policy: Policy, block: int) -> None:
        self._policy, self._block = policy, block
        self.now = self._next = self.most = 0
        self.kept: set[int] = set()
        self._before: set[int] = set()
        self._live: dict[Hashable, int] = {}
        self._foretold: set[Hashable] = set()

    def forward(self, key: Hashable, update: int, last: bool) -> int:
        """Return the version of a forward; `last` says whether no micro-batch of it follows."""
        policy = self._policy
        version = self.now if policy.lag is None else max(0, update - policy.lag)
        assert version == self.now or version in self.kept, "a version was dropped too early"
        self._next = self._oldest(update + last)
        foretold = policy.ahead(self._block, update, "F") > 0
        if policy.stash and foretold:
            self._foretold.add(key)
        elif policy.stash:
            self._live[key] = version
        self._count(foretold and not policy.stash)
        return version

    def backward(self, key: Hashable) -> int | None:
        """Return the version of a backward, None for what was stashed as it was foretold."""
        if key in self._foretold:
            return None
        return self._live.get(key, self.now)

    def learnt(self, key: Hashable) -> None:
        """Forget a micro-batch, and versions that only it needed."""
        self._foretold.discard(key)
        self._live.pop(key, None)
        self._drop()

    def update(self) -> bool:
        """Go on to the next version; return whether the present one has to be kept."""
        keeps = self.now in self._live.values() or self._next <= self.now
        if keeps:
            self.kept.add(self.now)
        if self._policy.prediction == "difference":
            self._before = {self.now}
        self.now += 1
        self._drop()
        self._count()
        return keeps

    def _oldest(self, update: int) -> int:
        """Return the oldest version that forwards from an update on will ask for."""
        lag = self._policy.lag
        return max(0, update - lag) if lag is not None else update + 1

    def _drop(self) -> None:
        wanted = set(self._live.values())
        self.kept = {v for v in self.kept if v in wanted or v >= self._next}

    def _count(self, brief: bool = False) -> None:
        """Count copies; a foretold one that is not stashed lasts for its forward."""
        now = len(self.kept | self._before) + len(self._foretold) + brief
        self.most = max(self.most, now)


def copies_of(actions: Sequence[Action], policy: Policy | None) -> dict[int, int]:
    """Return by block the most copies of its weights that one rank's actions keep at once."""
    if policy is None:
        return {}
    lasts = {(a.block, a.update): a.micro for a in actions if a.kind == "F" and not a.pass_}
    shelves: dict[int, Shelf] = {}
    for action in actions:
        shelf = shelves.setdefault(action.block, Shelf(policy, action.block))
        key = action.update, action.micro
        match action.kind:
            case "F" if not action.pass_:
                last = lasts[action.block, action.update] == action.micro
                shelf.forward(key, action.update, last)
            case "B" | "W":
                shelf.learnt(key)
            case "U":
                shelf.update()
    return {block: shelf.most for block, shelf in shelves.items()}
