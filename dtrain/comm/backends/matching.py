"""Post: matches sends with receives inside one process; under `threads` and `single`.

Invariant: a letter is complete only when both ends are there (rendezvous), and letters of one
route match in order, as in MPI. It has no lock: at most one rank runs at a time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable
from typing import final

from dtrain.comm.backends.base import Bytes, Request


@final
class PendingTransfer(Request):
    """One end of a transfer."""

    def __init__(self, data: Bytes) -> None:
        self.data = data
        self.done = False

    def test(self) -> bool:
        """Return whether the other end has come."""
        return self.done


@final
class Matcher:
    """Sends and receives that wait for their other end, by route.

    Attributes
    ----------
    events : int
        Letters posted so far: as long as it stands still, nothing has happened.
    """

    def __init__(self) -> None:
        self.event_count = 0
        self._sends: defaultdict[Hashable, deque[PendingTransfer]] = defaultdict(deque)
        self._receives: defaultdict[Hashable, deque[PendingTransfer]] = defaultdict(deque)

    def post_send(self, channel: Hashable, data: Bytes) -> PendingTransfer:
        """Post a send on a route (group, source, destination, tag)."""
        letter = PendingTransfer(data)
        self._match(channel, letter, self._sends, self._receives)
        return letter

    def post_recv(self, channel: Hashable, data: Bytes) -> PendingTransfer:
        """Post a receive on a route."""
        letter = PendingTransfer(data)
        self._match(channel, letter, self._receives, self._sends)
        return letter

    def _match(
        self,
        channel: Hashable,
        transfer: PendingTransfer,
        own_queues: defaultdict[Hashable, deque[PendingTransfer]],
        peer_queues: defaultdict[Hashable, deque[PendingTransfer]],
    ) -> None:
        self.event_count += 1
        if not peer_queues[channel]:
            own_queues[channel].append(transfer)
            return
        other = peer_queues[channel].popleft()
        sent, received = (transfer, other) if own_queues is self._sends else (other, transfer)
        if sent.data.size != received.data.size:
            raise RuntimeError(
                f"message of {sent.data.size} bytes met a receive of {received.data.size} bytes "
                f"on route {channel}"
            )
        received.data[:] = sent.data
        transfer.done = other.done = True
