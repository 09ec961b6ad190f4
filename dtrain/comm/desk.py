"""Desk: everything of one group that is in flight on one rank.

Invariant: nothing here waits; `look` and `poke` are cheap where nothing is in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from dtrain.comm.dock import Dock
from dtrain.comm.line import Line
from dtrain.comm.mean import Mean
from dtrain.comm.routes import Inbox, Outbox, Transfer
from dtrain.comm.trade import Trade
from dtrain.telemetry import Pending

TAGS = 1 << 14
"""Tags of users end here and those of collectives begin; MPI promises only 2^15 in all."""


@final
class Desk:
    """The routes and the collectives of one group.

    Attributes
    ----------
    name : str
        Of the group.
    outboxes, inboxes : dict of (int, int) to Outbox, to Inbox
        By the other end's rank and tag.
    running : list of (Mean or Trade)
        Collectives that were not complete at the last look.
    """

    def __init__(self, line: Line) -> None:
        self._line, self.name = line, line.name
        self.outboxes: dict[tuple[int, int], Outbox] = {}
        self.inboxes: dict[tuple[int, int], Inbox] = {}
        self.running: list[Mean | Trade] = []

    def outbox(self, to: int, tag: int) -> Outbox:
        """Return the messages from here to a rank."""
        if (to, tag) not in self.outboxes:
            self.outboxes[to, tag] = Outbox(self._line, to, _legal(tag))
        return self.outboxes[to, tag]

    def inbox(self, source: int, tag: int, dock: Dock) -> Inbox:
        """Return the messages from a rank to here."""
        if (source, tag) not in self.inboxes:
            self.inboxes[source, tag] = Inbox(self._line, source, _legal(tag), dock)
        return self.inboxes[source, tag]

    def next(self, source: int, tag: int) -> tuple[Inbox, Transfer]:
        """Return the next message of a route to here, and where it comes; `RuntimeError` where
        none was declared."""
        inbox = self.inboxes.get((source, tag))
        if inbox is None or inbox.posted is None:
            raise RuntimeError(f"no message is expected from rank {source} with tag {tag}")
        return inbox, inbox.posted

    def look(self, whole: bool = False) -> None:
        """Take note of what has arrived elsewhere, and go on with the collectives."""
        for outbox in self.outboxes.values():
            if outbox:
                outbox.look()
        if self.running:
            self.running = [each for each in self.running if not each.test(whole)]

    def poke(self) -> bool:
        """Look at receives until one is open; return whether one was."""
        for inbox in self.inboxes.values():
            if inbox.posted is not None and not inbox.posted.request.test():
                return True
        return False

    def pending(self) -> Iterator[Pending]:
        """Yield what is in flight, as of the last look."""
        for outbox in self.outboxes.values():
            yield from outbox.pending()
        for inbox in self.inboxes.values():
            yield from inbox.pending()
        for each in self.running:
            yield each.since, f"{each.words()} of {self._line.name}"


def _legal(tag: int) -> int:
    if not 0 <= tag < TAGS:
        raise ValueError(f"tag {tag} is not in 0 … {TAGS - 1}")
    return tag
