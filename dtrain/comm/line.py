"""Line: bytes of any length over a wire, counted.

Invariant: every payload passes `push` once, which is where it is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from dtrain.comm.tiers import Tiers
from dtrain.comm.traffic import Traffic
from dtrain.comm.wire import Bytes, Request, Wire, joined
from dtrain.telemetry import Flight


@final
class Line:
    """A wire whose messages may be longer than the wire allows.

    Attributes
    ----------
    wire : Wire
        What moves the bytes.
    rank, size : int
        Of the wire.
    tiers : Tiers
        Its ranks by node.
    traffic : Traffic
        Where payload is counted.
    flight : Flight
        Where events are noted.
    chunk_bytes : int
        Longer messages travel in parts.
    name : str
        Of the group, for people.
    """

    def __init__(
        self, wire: Wire, traffic: Traffic, flight: Flight, chunk_bytes: int, name: str
    ) -> None:
        self.wire, self.traffic, self.flight = wire, traffic, flight
        self.chunk_bytes, self.name = chunk_bytes, name
        self.rank, self.size = wire.rank, wire.size
        self.tiers = Tiers(wire.hosts, wire.rank)

    def others(self) -> list[int]:
        """Return all ranks but mine."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def push(self, data: Bytes, to: int, tag: int, counted: bool) -> Request:
        """Send; the memory must stay and not change until the request is complete."""
        if counted:
            hosts = self.wire.hosts
            self.traffic.count(data.size, near=hosts[to] == hosts[self.rank])
        return joined([self.wire.isend(part, to, tag) for part in self._chunks(data)])

    def pull(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive as many bytes as `data` holds."""
        return joined([self.wire.irecv(part, source, tag) for part in self._chunks(data)])

    def note(self, kind: str, peer: int, tag: int, size_bytes: int) -> None:
        """Record an event of a message."""
        end = "from" if kind == "received" else "to"
        self.flight.note(kind, size_bytes, "bytes", end, "rank", peer, "tag", tag, "of", self.name)

    def words(self, peer: int, tag: int) -> str:
        """Return the other end of a route, so that a person finds the process."""
        place = f"world rank {self.wire.world[peer]} on {self.wire.hosts[peer]}"
        return f"rank {peer} of {self.name} ({place}) with tag {tag}"

    def _chunks(self, data: Bytes) -> Iterator[Bytes]:
        for start in range(0, max(data.size, 1), self.chunk_bytes):
            yield data[start : start + self.chunk_bytes]
