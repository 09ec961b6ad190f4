"""Family: what a world and all groups split from it have in common, on one rank.

Invariant: `wait` is the only place where a rank waits, and every turn of it moves everything that
is in flight in any desk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import final

from dtrain.comm.allreduce import PIECE_BYTES
from dtrain.comm.backends.base import Backend, CommTimeout
from dtrain.comm.buffers import BufferPool
from dtrain.comm.channels import Channels
from dtrain.comm.flight_recorder import FlightRecorder, Pending
from dtrain.comm.staging import Host, Staging
from dtrain.comm.transport import TrafficCounter

WaitSpan = tuple[float, float, str]
"""Start and end by this rank's `perf_counter`, and what was waited for."""


DEBUG_TIMEOUT_S = 60.0
"""How long all ranks may take to come to a collective, in debug mode."""


SLOW_WAIT_S = 300.0
"""After so long a wait says so, once, and waits on."""


@final
class CommContext:
    """One rank's groups, and what they share.

    Attributes
    ----------
    traffic : Traffic
        What was sent.
    flight : Flight
        What happened last.
    desks : list of Desk
        One per group that is not closed.
    scratch : Scratch
        Memory of means.
    dock : Dock
        Where tensors meet the wire.
    waited_s : float
        Seconds spent in waits.
    limit_s : float or None
        In debug mode, how long all ranks may take to come to a collective.
    waits : list of Wait, or None
        Waits that are over, where somebody asked for them.
    """

    def __init__(self, backend: Backend) -> None:
        name = f"rank {backend.rank} of {backend.size} on {backend.hosts[backend.rank]}"
        self.flight = FlightRecorder(name, backend.rank, backend.size, backend.hosts[backend.rank])
        self.flight.pending_sources.append(self._pending)
        self.traffic = TrafficCounter()
        self.group_channels: list[Channels] = []
        self.buffer_pool = BufferPool(PIECE_BYTES)
        self.staging: Staging = Host()
        self.wait_s = 0.0
        self.debug_timeout_s: float | None = None
        self.recorded_waits: list[WaitSpan] | None = None

    @property
    def debug_mode(self) -> bool:
        """Whether the family is in debug mode."""
        return self.debug_timeout_s is not None

    def debug(self, timeout_s: float = DEBUG_TIMEOUT_S) -> None:
        """Call the roll before every collective of the whole family from now on.

        `Discord` is raised by ranks that call different operations, or with different tensors, and
        by those that wait `limit_s` seconds for a call. Local; all ranks must do so, before any.
        """
        self.debug_timeout_s = timeout_s

    def trace(self, enabled: bool) -> list[WaitSpan]:
        """Note the family's waits, or no more; return, and forget, those noted so far. Local."""
        told, self.recorded_waits = self.recorded_waits or [], [] if enabled else None
        return told

    def progress(self, all_lanes: bool = False) -> None:
        """Move everything that is in flight; never wait. `whole`: there is no next turn soon."""
        for desk in self.group_channels:
            desk.progress(all_lanes)

    def poll_receives(self) -> None:
        """Let the wire work on what comes, although nobody waits for it.

        A library such as MPI moves large messages only inside its calls: looking at one receive
        that is open moves all of them.
        """
        for desk in self.group_channels:
            if desk.poll_receives():
                return

    def close(self, channels: Channels) -> None:
        """Look at a desk no more; `RuntimeError` where something of it is in flight."""
        channels.progress()
        if left := list(channels.pending()):
            raise RuntimeError(
                f"{channels.name} is closed with {len(left)} in flight: {left[0][1]}"
            )
        if channels in self.group_channels:
            self.group_channels.remove(channels)

    def wait(
        self,
        is_done: Callable[[], bool],
        description: str,
        peers: Sequence[int],
        backend: Backend,
        timeout_s: float | None,
    ) -> None:
        """Return when `done()`; raise `Stall` after `timeout_s`.

        `peers` are the ranks of the world that are waited for.
        """
        start, turn = time.perf_counter(), 0
        waits, alarm = self.flight.open_waits, start + SLOW_WAIT_S
        waits.append((start, description, peers))
        try:
            while not is_done():
                self.progress()
                now = time.perf_counter()
                if timeout_s is not None and now - start > timeout_s:
                    raise CommTimeout(
                        f"rank {backend.rank} of {backend.size} waited {timeout_s:g} s for {description}"
                    )
                if now > alarm:
                    alarm = math.inf
                    self.flight.warn_slow_wait(SLOW_WAIT_S, description)
                backend.idle(turn, description)
                turn += 1
        finally:
            waits.pop()
            end = time.perf_counter()
            seconds = end - start
            self.wait_s += seconds
            if self.recorded_waits is not None:
                self.recorded_waits.append((start, end, description))
            self.flight.note("waited", seconds, "for", description)

    @contextmanager
    def record_wait(self, description: str, peers: Sequence[int]) -> Iterator[None]:
        """Note a wait that goes on inside the wire."""
        self.flight.open_waits.append((time.perf_counter(), description, peers))
        try:
            yield
        finally:
            self.flight.open_waits.pop()

    def _pending(self) -> Iterator[Pending]:
        for desk in self.group_channels:
            yield from desk.pending()
