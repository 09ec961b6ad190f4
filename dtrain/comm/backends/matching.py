"""Matching of sends with receives inside one process, for `threads` and `single`.

Invariant: a transfer is complete only when both ends are posted (rendezvous), and the transfers of
one channel match in order, as in MPI. It has no lock: at most one rank runs at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import final

from dtrain.comm.backends.base import Bytes, PointToPointRequest


@final
class PendingTransfer(PointToPointRequest):
    """One end of a transfer."""

    def __init__(self, data: Bytes) -> None:
        self.data = data
        self.done = False
        self.cancelled = False

    def test(self) -> bool:
        """Return whether the other end was posted too."""
        return self.done

    def cancel(self) -> None:
        """Withdraw a receive: no later send matches it."""
        self.cancelled = True


@final
class Matcher:
    """Sends and receives whose other end is not posted yet, by channel.

    Attributes
    ----------
    event_count : int
        Transfers posted so far; while it does not change, nothing happens.
    """

    def __init__(self) -> None:
        self.event_count = 0
        self._sends = _Queues()
        self._receives = _Queues()

    def post_send(self, channel: Hashable, data: Bytes) -> PendingTransfer:
        """Post a send on a channel (group, source, destination, tag)."""
        send = PendingTransfer(data)
        self.event_count += 1
        receive = self._receives.pop(channel)
        while receive is not None and receive.cancelled:
            receive = self._receives.pop(channel)
        if receive is None:
            self._sends.append(channel, send)
        else:
            _deliver(channel, send, receive)
        return send

    def post_recv(self, channel: Hashable, data: Bytes) -> PendingTransfer:
        """Post a receive on a channel."""
        receive = PendingTransfer(data)
        self.event_count += 1
        send = self._sends.pop(channel)
        if send is None:
            self._receives.append(channel, receive)
        else:
            _deliver(channel, send, receive)
        return receive


@final
class _Queues:
    """Queues by channel; an empty one is deleted, since collectives have channels of their own."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, deque[PendingTransfer]] = {}

    def append(self, channel: Hashable, transfer: PendingTransfer) -> None:
        """Add a transfer to the end of a queue."""
        self._queues.setdefault(channel, deque()).append(transfer)

    def pop(self, channel: Hashable) -> PendingTransfer | None:
        """Remove the first transfer of a queue and return it; None: the queue is empty."""
        queue = self._queues.get(channel)
        if queue is None:
            return None
        first = queue.popleft()
        if not queue:
            del self._queues[channel]
        return first


def _deliver(channel: Hashable, send: PendingTransfer, receive: PendingTransfer) -> None:
    if send.data.size != receive.data.size:
        raise RuntimeError(
            f"message of {send.data.size} bytes met a receive of {receive.data.size} bytes on "
            f"channel {channel}"
        )
    receive.data[:] = send.data
    send.done = receive.done = True
