"""Phases: when a run is in full rank and when in low, and how the learning rate comes back.

Invariant: pure in the number of the update and in lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from dtrain.errors import ConfigError

LOWEST_LR_FACTOR = 1 / 300
"""The learning rate after a change, as a part of what it would be: 1e-5 of the paper's 3e-3."""


class Phases(NamedTuple):
    """The lengths of a run's phases, in updates."""

    warmup: int
    period: int
    full_rank: int
    rebound: int

    def is_low_rank(self, update: int) -> bool:
        """Say whether an update is one of low rank."""
        since = update % self.period
        first = update - since <= self.warmup
        return update >= self.warmup and (first or since >= self.full_rank)

    def truncates(self, update: int) -> bool:
        """Say whether a split before this update cuts; the first one after the warm-up does not."""
        return update - update % self.period > self.warmup

    def lr_factor(self, since: int) -> float:
        """Return by what the learning rate is multiplied so many updates after a change."""
        return (
            1.0
            if since >= self.rebound
            else LOWEST_LR_FACTOR + (1 - LOWEST_LR_FACTOR) * since / self.rebound
        )


MergeMode = Literal["with-stale", "only-learned", "full", "only-b"]


@final
@dataclass(frozen=True)
class FactorGroups:
    """The replicas of each group, in order.

    Attributes
    ----------
    size : int
        Replicas of a group; the last may have fewer.
    halves : bool
        Whether some take A; if not, all take B.
    """

    members: tuple[range, ...]
    size: int
    trains_both: bool

    @classmethod
    def build(cls, count: int, size: int, mode: MergeMode) -> FactorGroups:
        """Return the groups of `count` replicas; a size of 0: two halves, with `only-b` all in one.

        Raises
        ------
        DtrainError
            One group cannot train both factors.
        """
        halves = mode != "only-b"
        if halves and size >= count > 1:
            raise ConfigError(
                "todo.key",
                f"[sync] group-size = {size} puts all {count} replicas into one group: give at "
                f'most {count - 1}, or mode = "only-b"',
                agreed=True,
            )
        own = min(size or (-(-count // 2) if halves else count), count)
        starts = range(0, count, own)
        return cls(tuple(range(i, min(i + own, count)) for i in starts), own, halves)

    def group_of_rank(self, rank: int) -> int:
        """Return the group of a replica."""
        return rank // self.size

    def trains_a(self, group: int) -> bool:
        """Say whether a group trains A."""
        return self.trains_both and group < len(self.members) / 2

    def replicas_training_a(self) -> int:
        """Return how many replicas train A."""
        return sum(len(own) for i, own in enumerate(self.members) if self.trains_a(i))
