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

from dtrain.comm.desk import Desk
from dtrain.comm.dock import Dock, Host
from dtrain.comm.mean import PIECE_BYTES
from dtrain.comm.memory import Scratch
from dtrain.comm.traffic import Traffic
from dtrain.comm.wire import Stall, Wire
from dtrain.telemetry import Flight, Pending

Wait = tuple[float, float, str]
"""Start and end by this rank's `perf_counter`, and what was waited for."""

LIMIT_S = 60.0
"""How long all ranks may take to come to a collective, in debug mode."""

SILENCE_S = 300.0
"""After so long a wait says so, once, and waits on."""


@final
class Family:
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

    def __init__(self, wire: Wire) -> None:
        name = f"rank {wire.rank} of {wire.size} on {wire.hosts[wire.rank]}"
        self.flight = Flight(name, wire.rank, wire.size, wire.hosts[wire.rank])
        self.flight.sources.append(self._pending)
        self.traffic = Traffic()
        self.desks: list[Desk] = []
        self.scratch = Scratch(PIECE_BYTES)
        self.dock: Dock = Host()
        self.waited_s = 0.0
        self.limit_s: float | None = None
        self.waits: list[Wait] | None = None

    @property
    def debugged(self) -> bool:
        """Whether the family is in debug mode."""
        return self.limit_s is not None

    def debug(self, limit_s: float = LIMIT_S) -> None:
        """Call the roll before every collective of the whole family from now on.

        `Discord` is raised by ranks that call different operations, or with different tensors, and
        by those that wait `limit_s` seconds for a call. Local; all ranks must do so, before any.
        """
        self.limit_s = limit_s

    def trace(self, on: bool) -> list[Wait]:
        """Note the family's waits, or no more; return, and forget, those noted so far. Local."""
        told, self.waits = self.waits or [], [] if on else None
        return told

    def progress(self, whole: bool = False) -> None:
        """Move everything that is in flight; never wait. `whole`: there is no next turn soon."""
        for desk in self.desks:
            desk.look(whole)

    def poke(self) -> None:
        """Let the wire work on what comes, although nobody waits for it.

        A library such as MPI moves large messages only inside its calls: looking at one receive
        that is open moves all of them.
        """
        for desk in self.desks:
            if desk.poke():
                return

    def close(self, desk: Desk) -> None:
        """Look at a desk no more; `RuntimeError` where something of it is in flight."""
        desk.look()
        if left := list(desk.pending()):
            raise RuntimeError(f"{desk.name} is closed with {len(left)} in flight: {left[0][1]}")
        if desk in self.desks:
            self.desks.remove(desk)

    def wait(
        self,
        done: Callable[[], bool],
        what: str,
        peers: Sequence[int],
        wire: Wire,
        timeout_s: float | None,
    ) -> None:
        """Return when `done()`; raise `Stall` after `timeout_s`.

        `peers` are the ranks of the world that are waited for.
        """
        start, turn = time.perf_counter(), 0
        waits, alarm = self.flight.waits, start + SILENCE_S
        waits.append((start, what, peers))
        try:
            while not done():
                self.progress()
                now = time.perf_counter()
                if timeout_s is not None and now - start > timeout_s:
                    raise Stall(
                        f"rank {wire.rank} of {wire.size} waited {timeout_s:g} s for {what}"
                    )
                if now > alarm:
                    alarm = math.inf
                    self.flight.alarm(SILENCE_S, what)
                wire.idle(turn, what)
                turn += 1
        finally:
            waits.pop()
            end = time.perf_counter()
            seconds = end - start
            self.waited_s += seconds
            if self.waits is not None:
                self.waits.append((start, end, what))
            self.flight.note("waited", seconds, "for", what)

    @contextmanager
    def noted(self, what: str, peers: Sequence[int]) -> Iterator[None]:
        """Note a wait that goes on inside the wire."""
        self.flight.waits.append((time.perf_counter(), what, peers))
        try:
            yield
        finally:
            self.flight.waits.pop()

    def _pending(self) -> Iterator[Pending]:
        for desk in self.desks:
            yield from desk.pending()
