"""Trade: a tensor from each rank to each other, at once (all-to-all).

Invariant: nothing is computed here; what a rank is given has the shape and dtype of what it would
have given itself, so nobody has to ask for sizes.

    rank 0 has a0 b0 c0            rank 0 gets a0 a1 a2
    rank 1 has a1 b1 c1     ->     rank 1 gets b0 b1 b2
    rank 2 has a2 b2 c2            rank 2 gets c0 c1 c2

Sent, for n ranks: (n - 1) parts each.
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
    """An all-to-all in flight; made by `Comm.iall_to_all`, which says what it means."""

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
        self._transport, self._tag, self._staging, self._wait = transport, tag, staging, wait
        self.start_time = time.perf_counter()
        self._parts, own = list(parts), parts[transport.rank]
        others = transport.other_ranks()
        self._recv_buffers = {rank: staging.recv_buffer(own.shape, own.dtype) for rank in others}
        self._send_buffers = [
            staging.to_host(parts[rank]) for rank in others
        ]  # kept while it is sent
        counted = transport.traffic.enabled
        pulls = [transport.irecv(as_bytes(self._recv_buffers[rank]), rank, tag) for rank in others]
        sends = zip(others, self._send_buffers, strict=True)
        self._request = combine_requests(
            [*pulls, *(transport.isend(as_bytes(p), r, tag, counted) for r, p in sends)]
        )

    def test(self, all_lanes: bool = False) -> bool:
        """Return whether all parts have come and gone."""
        return self._request.test()

    def wait(self) -> list[Tensor]:
        """Return, once all have come, what each rank gave me; my own part is not copied."""
        if not self.test():
            name, tag = self._transport.name, self._tag
            self._wait(self.test, f"{self.describe()} of {name} with tag {tag}")
        landed, dock, me = self._recv_buffers, self._staging, self._transport.rank
        ranks = range(self._transport.size)
        return [self._parts[r] if r == me else dock.to_device(landed[r]) for r in ranks]

    def describe(self) -> str:
        """Return what it is, for people."""
        return f"an exchange of {len(self._parts)} parts"
