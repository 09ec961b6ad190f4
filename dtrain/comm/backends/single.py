"""Self: one rank, which may send to itself.

Invariant: nothing comes from outside, so a wait in which nothing happens can never end: it raises.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Hashable
from typing import NoReturn, final

from dtrain.comm.backends.base import Backend, Bytes, CommTimeout, Request
from dtrain.comm.backends.matching import Matcher

DEADLOCK_TURNS = 3
"""Turns without any event after which a wait cannot end any more."""


@final
class SingleBackend(Backend):
    """The wire of a group of one."""

    def __init__(self, matcher: Matcher | None = None, group: Hashable = ()) -> None:
        self.rank, self.size = 0, 1
        self.hosts, self.world_ranks = (platform.node(),), (0,)
        self.library = "no MPI"
        self._matcher = matcher or Matcher()
        self._group = group
        self._split_count = 0
        self._idle_state = (0, 0)  # events at the last idle turn, turns since the last event

    def isend(self, data: Bytes, dest: int, tag: int) -> Request:
        """Send to myself; complete once I posted the receive."""
        return self._matcher.post_send((self._group, dest, tag), data)

    def irecv(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive from myself."""
        return self._matcher.post_recv((self._group, source, tag), data)

    def idle(self, turn: int, description: str) -> None:
        """Raise `Stall` where nothing has happened for some turns."""
        events, quiet = self._idle_state
        quiet = quiet + 1 if turn and events == self._matcher.event_count else 0
        self._idle_state = (self._matcher.event_count, quiet)
        if quiet >= DEADLOCK_TURNS:
            raise CommTimeout(f"rank 0 of 1 waits for {description}, which nobody will send")

    def split(self, color: int, key: int) -> SingleBackend:
        """Return another group of one; its messages are apart from mine."""
        self._split_count += 1
        return SingleBackend(self._matcher, (self._group, self._split_count))

    def abort(self, code: int) -> NoReturn:
        """Leave the program."""
        sys.exit(code)
