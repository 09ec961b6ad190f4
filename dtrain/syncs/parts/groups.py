"""Groups: which replicas train together, and which of two factors.

Invariant: pure arithmetic; groups are consecutive replicas, the first half of the groups takes A.

::

    5 replicas, size 2     0 1 | 2 3 | 4        A A B
    only-b                 0 1   2 3   4        B
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from dtrain.errors import Refusal

Mode = Literal["with-stale", "only-learned", "full", "only-b"]


@final
@dataclass(frozen=True)
class Groups:
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
    halves: bool

    @classmethod
    def of(cls, count: int, size: int, mode: Mode) -> Groups:
        """Return the groups of `count` replicas; a size of 0: two halves, with `only-b` all in one.

        Raises
        ------
        Refusal
            One group cannot train both factors.
        """
        halves = mode != "only-b"
        if halves and size >= count > 1:
            raise Refusal(
                f"[sync] group-size = {size} puts all {count} replicas into one group: give at "
                f'most {count - 1}, or mode = "only-b"',
                agreed=True,
            )
        own = min(size or (-(-count // 2) if halves else count), count)
        starts = range(0, count, own)
        return cls(tuple(range(i, min(i + own, count)) for i in starts), own, halves)

    def of_rank(self, rank: int) -> int:
        """Return the group of a replica."""
        return rank // self.size

    def takes_a(self, group: int) -> bool:
        """Say whether a group trains A."""
        return self.halves and group < len(self.members) / 2

    def learners(self) -> int:
        """Return how many replicas train A."""
        return sum(len(own) for i, own in enumerate(self.members) if self.takes_a(i))
