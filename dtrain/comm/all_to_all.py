"""All-to-all: each rank sends one tensor to each other rank.

Invariant: nothing is computed here. A received part has the shape and dtype of the part that this
rank keeps for itself, so sizes are not sent.

    rank 0 has a0 b0 c0            rank 0 receives a0 a1 a2
    rank 1 has a1 b1 c1     ->     rank 1 receives b0 b1 b2
    rank 2 has a2 b2 c2            rank 2 receives c0 c1 c2

Traffic for n ranks: (n - 1) parts each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor

from dtrain.comm.backends.base import Request, combine_requests
from dtrain.comm.buffers import as_bytes
from dtrain.comm.staging import Staging, require_dense
from dtrain.comm.transport import Transport


@final
class AllToAll(Request):
    """An all-to-all in flight; `Comm.ialltoall` makes and describes it."""

    def __init__(
        self,
        transport: Transport,
        parts: Sequence[Tensor],
        tag: int,
        staging: Staging,
        wait: Callable[[Callable[[], bool], str], None],
    ) -> None:
        if len(parts) != transport.size:
            raise ValueError(f"all_to_all of {len(parts)} parts among {transport.size} ranks")
        for number, part in enumerate(parts):
            require_dense(part, "all_to_all", number)
        self._transport = transport
        self._parts = list(parts)
        self._tag = tag
        self._staging = staging
        self._wait = wait
        self.start_time = time.perf_counter()
        own_part, others = parts[transport.rank], transport.other_ranks()
        self._recv_buffers = {
            rank: staging.recv_buffer(own_part.shape, own_part.dtype) for rank in others
        }
        # Attributes keep the memory alive while it is in flight.
        self._send_buffers = {rank: staging.to_host(parts[rank]) for rank in others}
        counted = transport.traffic.enabled
        receives = [
            transport.irecv(as_bytes(buffer), rank, tag)
            for rank, buffer in self._recv_buffers.items()
        ]
        sends = [
            transport.isend(as_bytes(buffer), rank, tag, counted)
            for rank, buffer in self._send_buffers.items()
        ]
        self._request = combine_requests([*receives, *sends])

    def test(self, all_lanes: bool = False) -> bool:
        """Return whether all parts have been sent and received."""
        return self._request.test()

    def wait(self) -> list[Tensor]:
        """Wait for all parts and return them, by sending rank; this rank's own is not copied."""
        if not self.test():
            name, tag = self._transport.name, self._tag
            self._wait(self.test, f"{self.describe()} of {name} with tag {tag}")
        received = {
            rank: self._staging.to_device(buffer) for rank, buffer in self._recv_buffers.items()
        }
        return [received.get(rank, part) for rank, part in enumerate(self._parts)]

    def describe(self) -> str:
        """Return a description for people."""
        return f"an exchange of {len(self._parts)} parts"
