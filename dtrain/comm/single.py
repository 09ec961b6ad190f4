"""Self: one rank, which may send to itself.

Invariant: nothing comes from outside, so a wait in which nothing happens can never end: it raises.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Hashable
from typing import NoReturn, final

from dtrain.comm.post import Post
from dtrain.comm.wire import Bytes, Request, Stall, Wire

PATIENCE = 3
"""Turns without any event after which a wait cannot end any more."""


@final
class SingleWire(Wire):
    """The wire of a group of one."""

    def __init__(self, post: Post | None = None, group: Hashable = ()) -> None:
        self.rank, self.size = 0, 1
        self.hosts, self.world = (platform.node(),), (0,)
        self.library = "no MPI"
        self._post = post or Post()
        self._group = group
        self._splits = 0
        self._seen = (0, 0)  # events at the last idle turn, turns since the last event

    def isend(self, data: Bytes, to: int, tag: int) -> Request:
        """Send to myself; complete once I posted the receive."""
        return self._post.send((self._group, to, tag), data)

    def irecv(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive from myself."""
        return self._post.receive((self._group, source, tag), data)

    def idle(self, turn: int, what: str) -> None:
        """Raise `Stall` where nothing has happened for some turns."""
        events, quiet = self._seen
        quiet = quiet + 1 if turn and events == self._post.events else 0
        self._seen = (self._post.events, quiet)
        if quiet >= PATIENCE:
            raise Stall(f"rank 0 of 1 waits for {what}, which nobody will send")

    def split(self, color: int, key: int) -> SingleWire:
        """Return another group of one; its messages are apart from mine."""
        self._splits += 1
        return SingleWire(self._post, (self._group, self._splits))

    def abort(self, code: int) -> NoReturn:
        """Leave the program."""
        sys.exit(code)
