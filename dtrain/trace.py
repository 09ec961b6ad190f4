"""Trace: when each rank did what, on one clock, for Perfetto (ui.perfetto.dev).

Invariant: the file is whole JSON after every segment; nothing that is trained follows from it.

::

    replica 0    stage 0   [F0.0][F0.1]......[  B0.0  ]        measured, waits inside
                 stage 1         [F1.0][  B1.0  ]
    plan         stage 0   [F0.0][F0.1]    [ B0.0 ]            the same plan, each action as long as
                 stage 1        [F1.0][ B1.0 ]                 the median of its kind and block

Clocks of hosts differ, and drift: they are compared at every segment's end, with a line between.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from dtrain.clocks import Ahead, Clocks
from dtrain.comm.comm import Comm
from dtrain.mail import Seat
from dtrain.schedules.action import Action, Route
from dtrain.schedules.check import Sizes
from dtrain.schedules.costs import Costs, Price
from dtrain.schedules.forecast import timeline
from dtrain.schedules.schedule import Schedule

FILE = "trace.json"
TAG = 1
PLANNED = 400
"""Micro-batches of a segment that are drawn as planned, at most."""

Event = dict[str, Any]


class Done(NamedTuple):
    """One action that ran, by this rank's clock, in seconds."""

    action: Action
    update: int
    start: float
    end: float


@final
class Trace:
    """One rank's part of a run's trace. Collective to make.

    Parameters
    ----------
    comm : Comm
        All ranks.
    seat : Seat
        This rank's place.
    schedule, routes
        What is drawn as planned.
    path : Path
        The file; rank 0 writes it.
    since_s : float
        Seconds of earlier attempts, after which this one is drawn.
    """

    def __init__(
        self,
        comm: Comm,
        seat: Seat,
        schedule: Schedule,
        routes: Sequence[Route],
        path: Path,
        since_s: float,
    ) -> None:
        self.comm, self.seat, self.path = comm, seat, path
        self.schedule, self.routes = schedule, routes
        self.line = comm.dup("trace")
        self.clocks = Clocks(self.line)
        self.done: list[Done] = []
        self.clock = self.clocks.ask()
        self.zero = time.perf_counter() - since_s
        comm.family.trace(True)
        if comm.rank == 0 and not since_s:
            path.unlink(missing_ok=True)
        names = comm.exchange([seat.replica, seat.stage, comm.hosts[comm.rank]])
        if comm.rank == 0:
            self._write([each for row in enumerate(names) for each in _named(*row)])

    def note(self, action: Action, update: int, start: float) -> None:
        """Note that an action has just ended that began at `start`; `update` is the run's."""
        self.done.append(Done(action, update, start, time.perf_counter()))

    def close(self, sizes: Sizes) -> None:
        """Write a segment. Collective.

        Parameters
        ----------
        sizes : sequence of sequence of int
            Micro-batches by [replica][update] of the segment.
        """
        before, self.clock = self.clock, self.clocks.ask()
        waits = self.comm.family.trace(True)
        rows = [[*each.action, each.update, each.start, each.end] for each in self.done]
        told = {"done": rows, "waits": waits, "clocks": [before, self.clock]}
        self.done = []
        everybody = self._gathered(json.dumps([self.seat.replica, self.seat.stage, told]).encode())
        if self.comm.rank == 0:
            events: list[Event] = []
            ranks = [json.loads(text) for text in everybody]
            for replica, stage, each in ranks:
                events += self._measured(replica, stage, each)
            self._write(events + self._planned(ranks, sizes))

    # ---- what all ranks do together

    def _gathered(self, mine: bytes) -> list[bytes]:
        """Return what all ranks have, on rank 0. Collective."""
        line, sizes = self.line, self.comm.exchange(len(mine))
        with self.comm.uncounted():
            if line.rank:
                line.isend(torch.frombuffer(bytearray(mine), dtype=torch.uint8), 0, TAG)
                line.flush()
                return []
            found = [mine]
            for rank in range(1, line.size):
                line.expect(rank, TAG, [((sizes[rank],), torch.uint8)])
                told = line.recv(rank, TAG)
                assert isinstance(told, Tensor)
                found.append(told.numpy().tobytes())
        return found

    # ---- what rank 0 makes of it

    def _measured(self, replica: int, stage: int, told: dict[str, Any]) -> list[Event]:
        """Return a rank's actions, and its waits inside them, by rank 0's clock."""
        one, two = (Ahead(*each) for each in told["clocks"])
        drift = (two.ahead - one.ahead) / (two.at - one.at) if two.at > one.at else 0.0

        def moment(at: float) -> float:
            return at - (one.ahead + drift * (at - one.at)) - self.zero

        place = {"pid": replica, "tid": stage}
        events = []
        for *words, update, start, end in told["done"]:
            action = Action(*words)
            args = {"update": update, "micro": action.micro, "block": action.block}
            events.append(_event(str(action), action.kind, moment(start), moment(end), place, args))
        for start, end, what in told["waits"]:
            events.append(_event("wait", "wait", moment(start), moment(end), place, {"for": what}))
        return events

    def _planned(self, ranks: list[Any], sizes: Sizes) -> list[Event]:
        """Return the first updates of the segment as planned, by the medians that were measured."""
        seat, took = self.seat, defaultdict[tuple[int, str], list[float]](list)
        for _, _, told in ranks:
            for action, seconds in _busy(told):
                took[action.block, action.kind].append(seconds)
        middle = {key: median(values) for key, values in took.items()}
        prices = []
        for block in range(len(seat.place)):
            f, b, i, w, u = (middle.get((block, kind), 0.0) for kind in "FBIWU")
            prices.append(Price(f, i or b, w, u))
        updates, micros = 0, 0
        while updates < len(sizes[0]) and micros < PLANNED:
            micros += sizes[0][updates]
            updates += 1
        rows = [row[:updates] for row in sizes]
        spans = timeline(self.schedule, seat.place, rows, self.routes, Costs(tuple(prices)))
        starts = [
            each["done"][0][-2] - each["clocks"][0][1] for _, _, each in ranks if each["done"]
        ]
        begin = min(starts, default=self.zero) - self.zero
        pid = seat.mesh.replicas
        return [
            _event(
                str(span.action),
                f"planned {span.action.kind}",
                begin + span.start,
                begin + span.end,
                {"pid": pid, "tid": span.stage},
                {"micro": span.action.micro, "block": span.action.block},
            )
            for span in spans
        ] + [_word("process_name", {"pid": pid}, "plan, each action as long as its median")]

    def _write(self, events: list[Event]) -> None:
        """Add events to the file, which is whole before and after."""
        lines = ",\n".join(json.dumps(event) for event in events)
        if not self.path.exists():
            self.path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            return
        with self.path.open("r+b") as file:
            file.seek(-3, 2)  # "\n]\n"
            file.write(f",\n{lines}\n]\n".encode())


def _busy(told: dict[str, Any]) -> list[tuple[Action, float]]:
    """Return a rank's actions and their seconds, without the waits inside them."""
    waits, at, found = told["waits"], 0, []
    for *words, _, start, end in told["done"]:
        lost = 0.0
        while at < len(waits) and waits[at][0] < end:
            lost += waits[at][1] - waits[at][0] if waits[at][0] >= start else 0.0
            at += 1
        found.append((Action(*words), end - start - lost))
    return found


def _event(name: str, kind: str, start: float, end: float, place: Event, args: Event) -> Event:
    """Return a span as Chrome's trace format has it: times in microseconds.

    Both ends are rounded, since a viewer drops spans that overlap by less than it shows.
    """
    first, last = round(1e6 * start, 1), round(1e6 * end, 1)
    times = {"ts": first, "dur": round(last - first, 1)}
    return {"name": name, "cat": kind, "ph": "X", **times, **place, "args": args}


def _word(what: str, place: Event, name: str) -> Event:
    return {"name": what, "ph": "M", **place, "args": {"name": name}}


def _named(rank: int, row: list[Any]) -> list[Event]:
    """Return the names of a rank's rows."""
    replica, stage, host = row
    place = {"pid": replica, "tid": stage}
    thread = _word("thread_name", place, f"stage {stage} (rank {rank} on {host})")
    return [_word("process_name", {"pid": replica}, f"replica {replica}"), thread]
