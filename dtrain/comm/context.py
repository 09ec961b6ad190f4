"""CommContext: the state that a world and all groups split from it share, on one rank.

Invariant: `wait` is the only place where a rank waits, and every turn of it moves everything that
is in flight in any group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, final

from dtrain.comm.allreduce import PIECE_BYTES
from dtrain.comm.backends.base import Backend, CommTimeout
from dtrain.comm.buffers import BufferPool
from dtrain.comm.flight_recorder import FlightRecorder, Pending
from dtrain.comm.staging import Host, Staging
from dtrain.comm.transport import TrafficCounter

WaitSpan = tuple[float, float, str]
"""Start and end by this rank's `perf_counter`, and the description of the wait."""


DEBUG_TIMEOUT_S = 60.0
"""Time that all ranks have to call a collective in debug mode."""


class Sends(Protocol):
    """The sends of a channel."""

    def __len__(self) -> int:
        """Return how many messages were in flight at the last look."""

    def release_completed(self) -> None:
        """Free the messages that have arrived."""


class Receives(Protocol):
    """The receives of a channel."""

    def is_open(self) -> bool:
        """Return whether the posted receive is not complete; tests it."""


class Collective(Protocol):
    """A collective in flight."""

    start_time: float

    def describe(self) -> str:
        """Return a description for people."""

    def test(self, all_lanes: bool = False) -> bool:
        """Advance it; return whether it is complete."""


class Group(Protocol):
    """A group of ranks, as the waits of all groups use it.

    Attributes
    ----------
    collectives : list of Collective
        Those that were not complete at the last look.
    """

    collectives: list[Collective]

    @property
    def send_channels(self) -> Mapping[tuple[int, int], Sends]:
        """Its channels to other ranks, by rank and tag."""

    @property
    def recv_channels(self) -> Mapping[tuple[int, int], Receives]:
        """Its channels from other ranks, by rank and tag."""

    def pending(self) -> Iterator[Pending]:
        """Yield what is in flight, as of the last look."""


@final
class CommContext:
    """The groups of one rank, and the state that they share.

    Attributes
    ----------
    traffic : TrafficCounter
        Payload bytes that this rank has sent.
    flight : FlightRecorder
        Its last events and open waits.
    groups : list of Group
        The groups that are not closed.
    buffer_pool : BufferPool
        Memory of means.
    staging : Staging
        How tensors reach memory that a backend can read.
    wait_s : float
        Seconds spent in waits.
    debug_timeout_s : float or None
        In debug mode, the time that all ranks have to call a collective.
    recorded_waits : list of WaitSpan, or None
        Waits that are over; None: they are not recorded.
    on_turn : callable, optional
        Called in every turn of a wait; it must not wait.
    """

    def __init__(self, backend: Backend) -> None:
        host = backend.hosts[backend.rank]
        name = f"rank {backend.rank} of {backend.size} on {host}"
        self.flight = FlightRecorder(name, backend.rank, backend.size, host)
        self.flight.pending_sources.append(self._pending)
        self.traffic = TrafficCounter()
        self.groups: list[Group] = []
        self.buffer_pool = BufferPool(PIECE_BYTES)
        self.staging: Staging = Host()
        self.wait_s = 0.0
        self.debug_timeout_s: float | None = None
        self.recorded_waits: list[WaitSpan] | None = None
        self.on_turn: Callable[[], None] | None = None

    @property
    def debug_mode(self) -> bool:
        """Whether every collective is compared over ranks before it starts."""
        return self.debug_timeout_s is not None

    def debug(self, timeout_s: float = DEBUG_TIMEOUT_S) -> None:
        """Compare the calls of all ranks before every collective of every group from now on.

        Ranks that call different operations, or pass different tensors, raise
        `CollectiveMismatch`; so does a rank that waits `timeout_s` seconds for the call of another.
        Local; all ranks must call it before their next collective.
        """
        self.debug_timeout_s = timeout_s

    def trace(self, enabled: bool) -> list[WaitSpan]:
        """Start or stop recording waits; return and delete the recorded ones. Local."""
        waits, self.recorded_waits = self.recorded_waits or [], [] if enabled else None
        return waits

    def progress(self, all_lanes: bool = False) -> None:
        """Move everything that is in flight; never wait.

        `all_lanes` advances every lane of a mean: there is no next turn soon.
        """
        for group in self.groups:
            for channel in group.send_channels.values():
                if channel:
                    channel.release_completed()
            if group.collectives:
                group.collectives = [
                    collective for collective in group.collectives if not collective.test(all_lanes)
                ]

    def poll_receives(self) -> bool:
        """Test posted receives up to the first open one; return whether there is one.

        The backend works on incoming messages although no rank waits for them: a library such as
        MPI moves large messages only inside its calls, and one test moves all of them.
        """
        return any(
            channel.is_open() for group in self.groups for channel in group.recv_channels.values()
        )

    def wait(
        self,
        is_done: Callable[[], bool],
        description: str,
        peers: Sequence[int],
        backend: Backend,
        timeout_s: float | None,
    ) -> None:
        """Return when `is_done()`.

        `peers` are the world ranks that this rank waits for.

        Raises
        ------
        CommTimeout
            After `timeout_s`; as `Deadlock` where no rank can continue (threads and single only).
        """
        start, turn = time.perf_counter(), 0
        open_waits = self.flight.open_waits
        open_waits.append((start, description, peers))
        try:
            while not is_done():
                self.progress()
                if self.on_turn is not None:
                    self.on_turn()
                now = time.perf_counter()
                if timeout_s is not None and now - start > timeout_s:
                    raise CommTimeout(
                        "comm.timeout",
                        f"rank {backend.rank} of {backend.size} waited {timeout_s:g} s for "
                        f"{description}",
                    )
                backend.idle(turn, description)
                turn += 1
        finally:
            open_waits.pop()
            end = time.perf_counter()
            self.wait_s += end - start
            if self.recorded_waits is not None:
                self.recorded_waits.append((start, end, description))
            self.flight.note("waited", end - start, "for", description)

    @contextmanager
    def record_wait(self, description: str, peers: Sequence[int]) -> Iterator[None]:
        """Show the body as an open wait in flight records: the backend itself waits there."""
        self.flight.open_waits.append((time.perf_counter(), description, peers))
        try:
            yield
        finally:
            self.flight.open_waits.pop()

    def _pending(self) -> Iterator[Pending]:
        for group in self.groups:
            yield from group.pending()
