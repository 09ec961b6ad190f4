"""The backend of a single rank, which may send to itself.

Invariant: no message comes from outside, so a wait in which nothing happens can never end: it
raises.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Hashable
from typing import NoReturn, final

from dtrain.comm.backends.base import Backend, Bytes, Deadlock, PointToPointRequest
from dtrain.comm.backends.matching import Matcher

DEADLOCK_TURNS = 3
"""A wait is a deadlock after so many turns without any event."""


@final
class SingleBackend(Backend):
    """A group of one rank."""

    def __init__(self, matcher: Matcher | None = None, group: Hashable = ()) -> None:
        self.rank, self.size = 0, 1
        self.hosts, self.nodes, self.world_ranks = (platform.node(),), (0,), (0,)
        self.library = "no MPI"
        self._matcher = matcher or Matcher()
        self._group = group
        self._split_count = 0
        self._last_event_count = 0
        self._idle_turns = 0  # since the last event

    def isend(self, data: Bytes, dest: int, tag: int) -> PointToPointRequest:
        """Send to this rank; complete once it posted the receive."""
        return self._matcher.post_send((self._group, dest, tag), data)

    def irecv(self, data: Bytes, source: int, tag: int) -> PointToPointRequest:
        """Receive from this rank."""
        return self._matcher.post_recv((self._group, source, tag), data)

    def idle(self, turn: int, description: str) -> None:
        """Raise `Deadlock` after some turns without any event."""
        event_count = self._matcher.event_count
        if turn and event_count == self._last_event_count:
            self._idle_turns += 1
        else:
            self._idle_turns = 0
        self._last_event_count = event_count
        if self._idle_turns >= DEADLOCK_TURNS:
            raise Deadlock(
                "comm.deadlock", f"rank 0 of 1 waits for {description}, which no rank will send"
            )

    def split(self, color: int, key: int) -> SingleBackend:
        """Return another group of one rank; its messages do not match those of this group."""
        self._split_count += 1
        return SingleBackend(self._matcher, (self._group, self._split_count))

    def abort(self, code: int) -> NoReturn:
        """Exit the program."""
        sys.exit(code)
