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

from dtrain.comm.communicator import Comm
from dtrain.engine.clock_sync import ClockOffset, ClockSync
from dtrain.mesh import RankPosition
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cost_model import BlockCost, CostModel
from dtrain.schedules.forecast import timeline
from dtrain.schedules.verify import MicroBatchCounts

TRACE_FILE = "trace.json"


TAG = 1


PLANNED_MICRO_BATCHES = 400
"""Micro-batches of a segment that are drawn as planned, at most."""


Event = dict[str, Any]


class ActionRecord(NamedTuple):
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
        position: RankPosition,
        schedule: Schedule,
        routes: Sequence[Route],
        path: Path,
        elapsed_s: float,
    ) -> None:
        self.comm, self.position, self.path = comm, position, path
        self.schedule, self.routes = schedule, routes
        self.trace_comm = comm.dup("trace")
        self.clock_sync = ClockSync(self.trace_comm)
        self.records: list[ActionRecord] = []
        self.clock_offset = self.clock_sync.measure_offset()
        self.time_origin = time.perf_counter() - elapsed_s
        comm.context.trace(True)
        if comm.rank == 0 and not elapsed_s:
            path.unlink(missing_ok=True)
        names = comm.allgather_object([position.replica, position.stage, comm.hosts[comm.rank]])
        if comm.rank == 0:
            self._write([each for row in enumerate(names) for each in _track_names(*row)])

    def note(self, action: Action, update: int, start: float) -> None:
        """Note that an action has just ended that began at `start`; `update` is the run's."""
        self.records.append(ActionRecord(action, update, start, time.perf_counter()))

    def write_segment(self, sizes: MicroBatchCounts) -> None:
        """Write a segment. Collective.

        Parameters
        ----------
        sizes : sequence of sequence of int
            Micro-batches by [replica][update] of the segment.
        """
        before, self.clock_offset = self.clock_offset, self.clock_sync.measure_offset()
        waits = self.comm.context.trace(True)
        rows = [[*each.action, each.update, each.start, each.end] for each in self.records]
        told = {"done": rows, "waits": waits, "clocks": [before, self.clock_offset]}
        self.records = []
        everybody = self._gather_to_root(
            json.dumps([self.position.replica, self.position.stage, told]).encode()
        )
        if self.comm.rank == 0:
            events: list[Event] = []
            ranks = [json.loads(text) for text in everybody]
            for replica, stage, each in ranks:
                events += self._measured_events(replica, stage, each)
            self._write(events + self._planned_events(ranks, sizes))

    # ---- what all ranks do together

    def _gather_to_root(self, payload: bytes) -> list[bytes]:
        """Return what all ranks have, on rank 0. Collective."""
        line, sizes = self.trace_comm, self.comm.allgather_object(len(payload))
        with self.comm.without_counting():
            if line.rank:
                line.isend(torch.frombuffer(bytearray(payload), dtype=torch.uint8), 0, TAG)
                line.flush()
                return []
            found = [payload]
            for rank in range(1, line.size):
                line.post_recv(rank, TAG, [((sizes[rank],), torch.uint8)])
                told = line.recv(rank, TAG)
                assert isinstance(told, Tensor)
                found.append(told.numpy().tobytes())
        return found

    # ---- what rank 0 makes of it

    def _measured_events(self, replica: int, stage: int, record: dict[str, Any]) -> list[Event]:
        """Return a rank's actions, and its waits inside them, by rank 0's clock."""
        one, two = (ClockOffset(*each) for each in record["clocks"])
        drift = (
            (two.offset - one.offset) / (two.measured_at - one.measured_at)
            if two.measured_at > one.measured_at
            else 0.0
        )

        def moment(at: float) -> float:
            return at - (one.offset + drift * (at - one.measured_at)) - self.time_origin

        place = {"pid": replica, "tid": stage}
        events = []
        for *words, update, start, end in record["done"]:
            action = Action(*words)
            args = {"update": update, "micro": action.micro, "block": action.block}
            events.append(_event(str(action), action.kind, moment(start), moment(end), place, args))
        for start, end, what in record["waits"]:
            events.append(_event("wait", "wait", moment(start), moment(end), place, {"for": what}))
        return events

    def _planned_events(self, ranks: list[Any], sizes: MicroBatchCounts) -> list[Event]:
        """Return the first updates of the segment as planned, by the medians that were measured."""
        seat, took = self.position, defaultdict[tuple[int, str], list[float]](list)
        for _, _, told in ranks:
            for action, seconds in _action_seconds(told):
                took[action.block, action.kind].append(seconds)
        middle = {key: median(values) for key, values in took.items()}
        prices = []
        for block in range(len(seat.place)):
            f, b, i, w, u = (middle.get((block, kind), 0.0) for kind in "FBIWU")
            prices.append(BlockCost(f, i or b, w, u))
        updates, micros = 0, 0
        while updates < len(sizes[0]) and micros < PLANNED_MICRO_BATCHES:
            micros += sizes[0][updates]
            updates += 1
        rows = [row[:updates] for row in sizes]
        spans = timeline(self.schedule, seat.place, rows, self.routes, CostModel(tuple(prices)))
        starts = [
            each["done"][0][-2] - each["clocks"][0][1] for _, _, each in ranks if each["done"]
        ]
        begin = min(starts, default=self.time_origin) - self.time_origin
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
        ] + [
            _metadata_event("process_name", {"pid": pid}, "plan, each action as long as its median")
        ]

    def _write(self, events: list[Event]) -> None:
        """Add events to the file, which is whole before and after."""
        lines = ",\n".join(json.dumps(event) for event in events)
        if not self.path.exists():
            self.path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            return
        with self.path.open("r+b") as file:
            file.seek(-3, 2)  # "\n]\n"
            file.write(f",\n{lines}\n]\n".encode())


def _action_seconds(record: dict[str, Any]) -> list[tuple[Action, float]]:
    """Return a rank's actions and their seconds, without the waits inside them."""
    waits, at, found = record["waits"], 0, []
    for *words, _, start, end in record["done"]:
        lost = 0.0
        while at < len(waits) and waits[at][0] < end:
            lost += waits[at][1] - waits[at][0] if waits[at][0] >= start else 0.0
            at += 1
        found.append((Action(*words), end - start - lost))
    return found


def _event(name: str, kind: str, start: float, end: float, track: Event, args: Event) -> Event:
    """Return a span as Chrome's trace format has it: times in microseconds.

    Both ends are rounded, since a viewer drops spans that overlap by less than it shows.
    """
    first, last = round(1e6 * start, 1), round(1e6 * end, 1)
    times = {"ts": first, "dur": round(last - first, 1)}
    return {"name": name, "cat": kind, "ph": "X", **times, **track, "args": args}


def _metadata_event(kind: str, track: Event, name: str) -> Event:
    return {"name": kind, "ph": "M", **track, "args": {"name": name}}


def _track_names(rank: int, row: list[Any]) -> list[Event]:
    """Return the names of a rank's rows."""
    replica, stage, host = row
    place = {"pid": replica, "tid": stage}
    thread = _metadata_event("thread_name", place, f"stage {stage} (rank {rank} on {host})")
    return [_metadata_event("process_name", {"pid": replica}, f"replica {replica}"), thread]
