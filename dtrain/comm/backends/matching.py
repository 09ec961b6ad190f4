"""Matching of sends with receives inside one process, for `threads` and `single`.

Invariant: a transfer is complete only when both ends are posted (rendezvous), and the transfers of
one channel match in order, as in MPI. It has no lock: at most one rank runs at a time.
"""

from __future__ import annotations

from collections import defaultdict, deque
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
        self._sends: defaultdict[Hashable, deque[PendingTransfer]] = defaultdict(deque)
        self._receives: defaultdict[Hashable, deque[PendingTransfer]] = defaultdict(deque)

    def post_send(self, channel: Hashable, data: Bytes) -> PendingTransfer:
        """Post a send on a channel (group, source, destination, tag)."""
        send = PendingTransfer(data)
        self.event_count += 1
        receives = self._receives[channel]
        while receives and receives[0].cancelled:
            receives.popleft()
        if receives:
            _deliver(channel, send, receives.popleft())
        else:
            self._sends[channel].append(send)
        return send

    def post_recv(self, channel: Hashable, data: Bytes) -> PendingTransfer:
        """Post a receive on a channel."""
        receive = PendingTransfer(data)
        self.event_count += 1
        if sends := self._sends[channel]:
            _deliver(channel, sends.popleft(), receive)
        else:
            self._receives[channel].append(receive)
        return receive


def _deliver(channel: Hashable, send: PendingTransfer, receive: PendingTransfer) -> None:
    if send.data.size != receive.data.size:
        raise RuntimeError(
            f"message of {send.data.size} bytes met a receive of {receive.data.size} bytes on "
            f"channel {channel}"
        )
    receive.data[:] = send.data
    send.done = receive.done = True
