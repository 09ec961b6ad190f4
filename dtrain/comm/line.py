"""Line: bytes of any length over a wire, counted.

Invariant: every payload passes `push` once, which is where it is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from dtrain.comm.traffic import Traffic
from dtrain.comm.wire import All, Bytes, Request, Wire


@final
class Line:
    """A wire whose messages may be longer than the wire allows.

    Attributes
    ----------
    wire : Wire
        What moves the bytes.
    rank, size : int
        Of the wire.
    traffic : Traffic
        Where payload is counted.
    chunk_bytes : int
        Longer messages travel in parts.
    """

    def __init__(self, wire: Wire, traffic: Traffic, chunk_bytes: int) -> None:
        self.wire, self.traffic, self.chunk_bytes = wire, traffic, chunk_bytes
        self.rank, self.size = wire.rank, wire.size

    def others(self) -> list[int]:
        """Return all ranks but mine."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def push(self, data: Bytes, to: int, tag: int, counted: bool) -> Request:
        """Send; the memory must stay and not change until the request is complete."""
        if counted:
            hosts = self.wire.hosts
            self.traffic.count(data.size, near=hosts[to] == hosts[self.rank])
        return All(self.wire.isend(part, to, tag) for part in self._chunks(data))

    def pull(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive as many bytes as `data` holds."""
        return All(self.wire.irecv(part, source, tag) for part in self._chunks(data))

    def _chunks(self, data: Bytes) -> Iterator[Bytes]:
        for start in range(0, max(data.size, 1), self.chunk_bytes):
            yield data[start : start + self.chunk_bytes]
