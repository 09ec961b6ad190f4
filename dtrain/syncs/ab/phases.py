"""The schedule of AB training: which updates are low-rank, and which replicas train which factor.

Invariant: everything here is pure in the number of the update and in lengths and sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from dtrain.errors import ConfigError

LOWEST_LR_FACTOR = 1 / 300
"""The learning-rate factor right after a phase change; the paper goes from 3e-3 to 1e-5."""


class Phases(NamedTuple):
    """Lengths of the phases of a run, in updates.

    Attributes
    ----------
    warmup : int
        Full-rank updates at the start.
    period : int
        Updates of a period, which begins with full rank and continues in low rank.
    full_rank : int
        Full-rank updates at the start of a period.
    rebound : int
        Updates over which the learning rate rises again after a change.
    """

    warmup: int
    period: int
    full_rank: int
    rebound: int

    def is_low_rank(self, update: int) -> bool:
        """Return whether an update is in a low-rank phase."""
        offset = update % self.period
        first_period = update - offset <= self.warmup
        return update >= self.warmup and (first_period or offset >= self.full_rank)

    def truncates(self, update: int) -> bool:
        """Return whether a factorization before this update truncates; the first one does not."""
        return update - update % self.period > self.warmup

    def lr_factor(self, updates_since_change: int) -> float:
        """Return the learning-rate factor so many updates after a phase change."""
        if updates_since_change >= self.rebound:
            return 1.0
        return LOWEST_LR_FACTOR + (1 - LOWEST_LR_FACTOR) * updates_since_change / self.rebound


MergeMode = Literal["with-stale", "only-learned", "full", "only-b"]


@final
@dataclass(frozen=True)
class FactorGroups:
    """The groups of replicas that train one factor each.

    Attributes
    ----------
    members : tuple of range
        The replicas of each group, in order.
    size : int
        Replicas of a group; the last group may have fewer.
    trains_both : bool
        Whether the first half of the groups trains A. If not, all train B.
    """

    members: tuple[range, ...]
    size: int
    trains_both: bool

    @classmethod
    def build(cls, replicas: int, size: int, mode: MergeMode) -> FactorGroups:
        """Return the groups of so many replicas.

        A size of 0 makes two groups, or a single one in mode "only-b".

        Raises
        ------
        ConfigError
            A single group cannot train both factors.
        """
        trains_both = mode != "only-b"
        if trains_both and size >= replicas > 1:
            raise ConfigError(
                "sync.group-size",
                f"[sync] group-size = {size} puts all {replicas} replicas into one group, which "
                f"cannot train both factors: it must be at most {replicas - 1}, or set "
                'mode = "only-b"',
                on_all_ranks=True,
            )
        default_size = -(-replicas // 2) if trains_both else replicas
        size = min(size or default_size, replicas)
        starts = range(0, replicas, size)
        members = tuple(range(start, min(start + size, replicas)) for start in starts)
        return cls(members, size, trains_both)

    def group_of_rank(self, rank: int) -> int:
        """Return the group of a replica."""
        return rank // self.size

    def trains_a(self, group: int) -> bool:
        """Return whether a group trains A."""
        return self.trains_both and group < len(self.members) / 2

    def replicas_training_a(self) -> int:
        """Return how many replicas train A."""
        return sum(len(ranks) for group, ranks in enumerate(self.members) if self.trains_a(group))
