"""WaitGraph: which rank waits for which.

Invariant: an edge leads from a rank in a wait to every rank that the wait lacks. Ranks with equal
waits are in the same collective, so none of them is awaited.

    rank 4: waits for rank 3             4 --> 3 --> 2   one edge per awaited rank
    rank 3: in a mean of ranks 2, 3
    rank 2: in no wait                   a root
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple, final


class Wait(NamedTuple):
    """A wait of a rank.

    Attributes
    ----------
    description : str
        What the rank waits for.
    peers : str
        The world ranks that take part or have to act, as "0-3,8".
    """

    description: str
    peers: str


@final
class WaitGraph:
    """The graph of the waits of all ranks.

    Parameters
    ----------
    waits : mapping of int to Wait
        The waits by rank; ranks without one are left out.

    Attributes
    ----------
    waiting, awaited : dict of Wait to set of int
        By wait: ranks that are in it, and ranks that it lacks.
    """

    def __init__(self, waits: Mapping[int, Wait]) -> None:
        self.waiting: defaultdict[Wait, set[int]] = defaultdict(set)
        for rank, wait in waits.items():
            self.waiting[wait].add(rank)
        self.awaited = {
            wait: parse_ranks(wait.peers) - ranks for wait, ranks in self.waiting.items()
        }

    def blocked_by(self, roots: Collection[int]) -> set[int]:
        """Return the ranks that wait for one of `roots`, directly or through other ranks."""
        blocked: set[int] = set()
        new_ranks = set(roots)
        while new_ranks:
            waits = [wait for wait, ranks in self.awaited.items() if ranks & new_ranks]
            new_ranks = {rank for wait in waits for rank in self.waiting[wait]} - blocked
            blocked |= new_ranks
        return blocked

    def deadlocked(self, roots: Collection[int]) -> set[int]:
        """Return the waiting ranks that none of `roots` blocks."""
        waiting = {rank for ranks in self.waiting.values() for rank in ranks}
        return waiting - self.blocked_by(roots)


def parse_ranks(text: str) -> set[int]:
    """Return the ranks in "0-3,8"."""
    ranks: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        ranks |= set(range(int(first), int(last or first) + 1))
    return ranks
