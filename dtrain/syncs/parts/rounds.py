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

from dtrain.syncs.parts.apart import Apart
from dtrain.syncs.sync import Clock


class Rounds(Apart):
    """Steps apart and meetings; a subclass says when they meet, and may say what happens there."""

    @abstractmethod
    def meets(self, clock: Clock) -> bool:
        """Say whether the replicas meet after this update."""

    def meet(self) -> None:
        """Replace the parameters by their plain mean over the replicas. Collective."""
        self.replicas.mean_(self.block.values())

    def after_update(self, clock: Clock) -> None:
        """Meet where it is time."""
        self.equal = self.meets(clock)
        if self.equal:
            self.meet()
