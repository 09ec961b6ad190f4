"""Line: bytes of any length over a wire, counted.

Invariant: every payload passes `push` once, which is where it is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

from dtrain.comm.backends.base import Backend, Bytes, Request, combine_requests
from dtrain.comm.flight_recorder import FlightRecorder
from dtrain.comm.node_topology import NodeTopology


@final
class Transport:
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
        self,
        backend: Backend,
        traffic: TrafficCounter,
        flight: FlightRecorder,
        chunk_bytes: int,
        name: str,
    ) -> None:
        self.backend, self.traffic, self.flight = backend, traffic, flight
        self.chunk_bytes, self.name = chunk_bytes, name
        self.rank, self.size = backend.rank, backend.size
        self.topology = NodeTopology(backend.hosts, backend.rank)

    def other_ranks(self) -> list[int]:
        """Return all ranks but mine."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def isend(self, data: Bytes, dest: int, tag: int, count_bytes: bool) -> Request:
        """Send; the memory must stay and not change until the request is complete."""
        if count_bytes:
            hosts = self.backend.hosts
            self.traffic.count(data.size, intra_node=hosts[dest] == hosts[self.rank])
        return combine_requests(
            [self.backend.isend(part, dest, tag) for part in self._chunks(data)]
        )

    def irecv(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive as many bytes as `data` holds."""
        return combine_requests(
            [self.backend.irecv(part, source, tag) for part in self._chunks(data)]
        )

    def note(self, kind: str, peer: int, tag: int, size_bytes: int) -> None:
        """Record an event of a message."""
        end = "from" if kind == "received" else "to"
        self.flight.note(kind, size_bytes, "bytes", end, "rank", peer, "tag", tag, "of", self.name)

    def describe_channel(self, peer: int, tag: int) -> str:
        """Return the other end of a route, so that a person finds the process."""
        place = f"world rank {self.backend.world_ranks[peer]} on {self.backend.hosts[peer]}"
        return f"rank {peer} of {self.name} ({place}) with tag {tag}"

    def _chunks(self, data: Bytes) -> Iterator[Bytes]:
        for start in range(0, max(data.size, 1), self.chunk_bytes):
            yield data[start : start + self.chunk_bytes]


@final
@dataclass
class TrafficCounter:
    """Payload bytes sent by this rank, over all groups that it belongs to.

    Attributes
    ----------
    bytes_intra, bytes_inter : int
        To ranks of the same host (itself included), to ranks of other hosts.
    on : bool
        Whether what is started now is counted.
    held_bytes, peak_held_bytes : int
        Buffers of messages under way and of posted receives, now and at most.
    """

    bytes_intra: int = 0
    bytes_inter: int = 0
    enabled: bool = True
    message_bytes: int = 0
    peak_message_bytes: int = 0

    def count(self, size_bytes: int, intra_node: bool) -> None:
        """Add one message."""
        if intra_node:
            self.bytes_intra += size_bytes
        else:
            self.bytes_inter += size_bytes

    def add_message_bytes(self, size_bytes: int) -> None:
        """Add a buffer to those that messages occupy; a negative size gives it back."""
        self.message_bytes += size_bytes
        self.peak_message_bytes = max(self.peak_message_bytes, self.message_bytes)

    @contextmanager
    def without_counting(self) -> Iterator[None]:
        """Count nothing that is started inside."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before
