"""Rounds: replicas take steps apart, and at the end of each round they meet.

Invariant: who meets when follows from the clock and from what is in the state, so neither segments
nor resuming move a meeting.

::

    update     0   1   2   3   4   5   6
    replica 0  s   s   s | s   s   s | s        s: a step of its own
    replica 1  s   s   s | s   s   s | s        |: all meet
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from dtrain.syncs.parts.apart import Apart
from dtrain.syncs.sync import Clock, under


class Rounds(Apart):
    """Steps apart and meetings; a subclass says when they meet, and may say what happens there.

    Where a carrier is not exact, what travels are the movements since the last meeting.
    """

    def __init__(self) -> None:
        self._base: dict[str, Tensor] = {}

    @abstractmethod
    def meets(self, clock: Clock) -> bool:
        """Say whether the replicas meet after this update."""

    def meet(self, clock: Clock) -> None:
        """Replace the parameters by their plain mean over the replicas. Collective."""
        own = self.block.values()
        if self.carrier.exact:
            self.replicas.mean_(own)
            return
        moved = {name: each - self._base[name] for name, each in own.items()}
        self.carrier.mean_(self.replicas, moved, 1 / self.replicas.size, clock.update)
        for name, each in own.items():
            each.copy_(self._base[name].add_(moved[name]))

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """Keep the weights with which a round begins, where movements are to travel."""
        if self.equal and not self.carrier.exact:
            self._base = {name: each.clone() for name, each in self.block.values().items()}

    def after_update(self, clock: Clock) -> None:
        """Meet where it is time."""
        self.equal = self.meets(clock)
        if self.equal:
            self.meet(clock)

    def state(self) -> dict[str, Tensor]:
        """Return whether the replicas hold the same parameters, and where they last did."""
        return super().state() | {f"base/{name}": each for name, each in self._base.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        self._base = {name: each.clone() for name, each in under(state, "base/").items()}
