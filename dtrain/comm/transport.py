"""Transport: bytes of any length over a backend, counted.

Invariant: every payload passes `isend` once, and is counted there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

from dtrain.comm.backends.base import Backend, Bytes, CombinedRequest, PointToPointRequest
from dtrain.comm.flight_recorder import FlightRecorder
from dtrain.comm.node_topology import NodeTopology


@final
class Transport:
    """A backend for messages that may be longer than the backend allows.

    Attributes
    ----------
    backend : Backend
        The object that moves the bytes.
    rank, size : int
        Of the backend.
    topology : NodeTopology
        Its ranks by node.
    traffic : TrafficCounter
        Counts payload.
    flight : FlightRecorder
        Records events.
    chunk_bytes : int
        Longer messages travel in chunks of this length.
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
        self.backend = backend
        self.traffic = traffic
        self.flight = flight
        self.chunk_bytes = chunk_bytes
        self.name = name
        self.rank, self.size = backend.rank, backend.size
        self.topology = NodeTopology(backend.nodes, backend.rank)

    def other_ranks(self) -> list[int]:
        """Return all ranks of the group but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def isend(self, data: Bytes, dest: int, tag: int, count_bytes: bool) -> PointToPointRequest:
        """Send; the memory must stay and not change until the request is complete."""
        if count_bytes:
            self.traffic.count(data.size, intra_node=self.topology.is_local(dest))
        if data.size <= self.chunk_bytes:
            return self.backend.isend(data, dest, tag)
        return CombinedRequest(self.backend.isend(part, dest, tag) for part in self._chunks(data))

    def irecv(self, data: Bytes, source: int, tag: int) -> PointToPointRequest:
        """Receive as many bytes as `data` holds."""
        if data.size <= self.chunk_bytes:
            return self.backend.irecv(data, source, tag)
        return CombinedRequest(self.backend.irecv(part, source, tag) for part in self._chunks(data))

    def note(self, kind: str, peer: int, tag: int, size_bytes: int) -> None:
        """Record an event of a message."""
        end = "from" if kind == "received" else "to"
        self.flight.note(kind, size_bytes, "bytes", end, "rank", peer, "tag", tag, "of", self.name)

    def describe_channel(self, peer: int, tag: int) -> str:
        """Return the other end of a channel as text that lets a person find the process."""
        process = f"world rank {self.backend.world_ranks[peer]} on {self.backend.hosts[peer]}"
        return f"rank {peer} of {self.name} ({process}) with tag {tag}"

    def _chunks(self, data: Bytes) -> Iterator[Bytes]:
        for start in range(0, data.size, self.chunk_bytes):
            yield data[start : start + self.chunk_bytes]


@final
@dataclass
class TrafficCounter:
    """Payload bytes sent by this rank, over all groups that it belongs to.

    Attributes
    ----------
    bytes_intra, bytes_inter : int
        To ranks of the same node (this rank included), to ranks of other nodes.
    enabled : bool
        Whether sends that start now are counted.
    message_bytes, peak_message_bytes : int
        Memory of messages in flight and of posted receives, now and at most.
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
        """Add the memory of a message; a negative size frees it."""
        self.message_bytes += size_bytes
        self.peak_message_bytes = max(self.peak_message_bytes, self.message_bytes)

    @contextmanager
    def without_counting(self) -> Iterator[None]:
        """Do not count sends that start inside."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before
