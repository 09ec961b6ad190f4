"""Observer: decides by the positions of all ranks whether a run hangs.

Invariant: pure in the positions and in the clock of this rank. A run in which any rank has events,
or waits for a rank that is within its limit, goes on.

    stuck       in no wait, and without an event for longer than its limit
                or no new position for a while: stopped, lost, or it holds the lock of Python
                or waits for a stuck rank
                or waits for longer than its limit
    hang        all ranks are stuck, and this one has exceeded its limit
    culprits    stuck ranks in no wait, silent ranks; without any: ranks that wait for each other
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from dtrain.monitoring.wait_graph import WaitGraph
from dtrain.watchdog.positions import Position


@final
@dataclass(frozen=True)
class Hang:
    """The ranks of a run that hangs, or may hang soon.

    Attributes
    ----------
    positions : dict of int to Position
        The last position of each rank that has one.
    silent : set of int
        Ranks without a new position.
    culprits : list of int
        The likely causes, the one that blocks most ranks first.
    blocked : dict of int to int
        The number of ranks that each culprit blocks.
    is_deadlock : bool
        Whether the culprits wait for each other.
    """

    positions: dict[int, Position]
    silent: set[int]
    culprits: list[int]
    blocked: dict[int, int]
    is_deadlock: bool


@final
class Observer:
    """The positions of all ranks, as one of them reads them.

    Parameters
    ----------
    rank, size : int
        This rank, and the number of ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size
        self._began_s: float | None = None
        self._seen: dict[int, tuple[Position, float]] = {}

    @property
    def has_begun(self) -> bool:
        """Whether a position was read since the last `reset`."""
        return self._began_s is not None

    def reset(self) -> None:
        """Forget all positions: the alarm is over, or this process was stopped."""
        self._began_s = None
        self._seen = {}

    def observe(self, now: float, positions: Iterable[Position]) -> None:
        """Take the positions that were read now."""
        if self._began_s is None:
            self._began_s = now
        for position in positions:
            seen = self._seen.get(position.rank)
            if seen is None or seen[0].beat != position.beat:
                self._seen[position.rank] = position, now

    def watched_s(self, now: float) -> float:
        """Return the seconds since the first reading."""
        return 0.0 if self._began_s is None else now - self._began_s

    def suspects(self, now: float, silent_s: float) -> Hang:
        """Return the ranks that others wait for, whether or not they are within their limits.

        `silent_s` is the age of the last position from which a rank is silent.
        """
        silent = {rank for rank in range(self._size) if now - self._seen_s(rank) > silent_s}
        positions = {rank: position for rank, (position, _) in self._seen.items()}
        waits = {
            rank: position.wait
            for rank, position in positions.items()
            if rank not in silent and position.wait is not None
        }
        graph = WaitGraph(waits)
        roots = {rank for rank in range(self._size) if rank not in waits}
        deadlocked = graph.deadlocked(roots)
        causes = roots or deadlocked
        blocked = {rank: len(graph.blocked_by({rank}) - {rank}) for rank in causes}
        culprits = sorted(causes, key=lambda rank: (-blocked[rank], rank))
        return Hang(positions, silent, culprits, blocked, not roots)

    def hang(self, now: float, silent_s: float) -> Hang | None:
        """Return the hang, None if the run makes progress."""
        suspects = self.suspects(now, silent_s)
        if not self._is_over(self._rank, now):
            return None
        if suspects.is_deadlock:
            is_stuck = all(self._is_over(rank, now) for rank in range(self._size))
            return suspects if is_stuck else None
        stuck = {
            rank
            for rank in suspects.culprits
            if rank in suspects.silent or self._is_over(rank, now)
        }
        if len(stuck) < len(suspects.culprits):
            return None
        waits = {
            rank: position.wait
            for rank, position in suspects.positions.items()
            if rank not in stuck and position.wait is not None
        }
        unblocked = WaitGraph(waits).deadlocked(stuck)
        return suspects if all(self._is_over(rank, now) for rank in unblocked) else None

    def _seen_s(self, rank: int) -> float:
        """Return when the last position of a rank was read first."""
        if rank in self._seen:
            return self._seen[rank][1]
        return self._began_s or 0.0

    def _is_over(self, rank: int, now: float) -> bool:
        """Return whether a rank has been without an event for longer than its limit."""
        position, seen_s = self._seen.get(rank, (None, 0.0))
        if position is None or position.limit_s is None:
            return False
        return position.still_s + (now - seen_s) > position.limit_s
