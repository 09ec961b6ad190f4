"""Phases: when a run is in full rank and when in low, and how the learning rate comes back.

Invariant: pure in the number of the update and in lengths.
"""

from __future__ import annotations

from typing import NamedTuple

LOWEST = 1 / 300
"""The learning rate after a change, as a part of what it would be: 1e-5 of the paper's 3e-3."""


class Phases(NamedTuple):
    """The lengths of a run's phases, in updates."""

    warmup: int
    every: int
    full: int
    rebound: int

    def low(self, update: int) -> bool:
        """Say whether an update is one of low rank."""
        since = update % self.every
        first = update - since <= self.warmup
        return update >= self.warmup and (first or since >= self.full)

    def cuts(self, update: int) -> bool:
        """Say whether a split before this update cuts; the first one after the warm-up does not."""
        return update - update % self.every > self.warmup

    def rate(self, since: int) -> float:
        """Return by what the learning rate is multiplied so many updates after a change."""
        return 1.0 if since >= self.rebound else LOWEST + (1 - LOWEST) * since / self.rebound
