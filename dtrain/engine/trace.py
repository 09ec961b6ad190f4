"""Trace: when each rank ran each action, on one clock, for Perfetto (ui.perfetto.dev).

Invariant: the file is complete JSON after every segment. The trace has no effect on training.

::

    replica 0    stage 0   [F0.0][F0.1]......[  B0.0  ]        measured, waits inside
                 stage 1         [F1.0][  B1.0  ]
    plan         stage 0   [F0.0][F0.1]    [ B0.0 ]            the same plan, each action as long as
                 stage 1        [F1.0][ B1.0 ]                 the median of its kind and block

Clocks of hosts differ, and drift. Their offsets are measured at the end of every segment and
interpolated in between.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.comm.context import WaitSpan
from dtrain.engine.clock_sync import ClockOffset, ClockSync
from dtrain.mesh import RankPosition
from dtrain.schedules.actions import KINDS, Action, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cost_model import BlockCost, CostModel
from dtrain.schedules.forecast import timeline
from dtrain.schedules.verify import MicroBatchCounts

TRACE_FILE = "trace.json"


TAG = 1


PLANNED_MICRO_BATCHES = 400
"""Micro-batches of a segment that are drawn as planned, at most."""


Event = dict[str, Any]
"""An event of Chrome's trace format."""


class ActionRecord(NamedTuple):
    """One action that ran, by this rank's clock, in seconds."""

    action: Action
    update: int
    start: float
    end: float


class RankRecord(NamedTuple):
    """The actions and waits of one rank in a segment, by its own clock.

    Attributes
    ----------
    waits : list of (float, float, str)
        Start, end and description.
    clock_offsets : (ClockOffset, ClockOffset)
        Measured before and after the segment.
    """

    replica: int
    stage: int
    actions: list[ActionRecord]
    waits: list[WaitSpan]
    clock_offsets: tuple[ClockOffset, ClockOffset]

    def to_json(self) -> bytes:
        """Return the record as JSON."""
        return json.dumps(self).encode()

    @classmethod
    def from_json(cls, text: bytes) -> RankRecord:
        """Return the record that `to_json` wrote."""
        replica, stage, actions, waits, clock_offsets = json.loads(text)
        before, after = (ClockOffset(*offset) for offset in clock_offsets)
        records = [ActionRecord(Action(*action), *times) for action, *times in actions]
        return cls(replica, stage, records, waits, (before, after))

    def global_time(self, local_time: float) -> float:
        """Return a time of this rank's clock by rank 0's clock."""
        before, after = self.clock_offsets
        elapsed = after.measured_at - before.measured_at
        drift = (after.offset - before.offset) / elapsed if elapsed > 0 else 0.0
        return local_time - (before.offset + drift * (local_time - before.measured_at))

    def action_seconds(self) -> Iterator[tuple[Action, float]]:
        """Yield the actions and their seconds, without the waits inside them."""
        number = 0
        for record in self.actions:
            wait_seconds = 0.0
            while number < len(self.waits) and self.waits[number][0] < record.end:
                start, end, _ = self.waits[number]
                wait_seconds += end - start if start >= record.start else 0.0
                number += 1
            yield record.action, record.end - record.start - wait_seconds


@final
class Trace:
    """One rank's part of the trace of a run. Making it is collective over all ranks.

    Parameters
    ----------
    comm : Comm
        All ranks.
    position : RankPosition
        This rank's coordinates on the mesh.
    schedule, routes
        For the plan that is drawn beside the measurement.
    path : Path
        The file; rank 0 writes it.
    elapsed_s : float
        Seconds of earlier attempts; this attempt is drawn after them.
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
        self.comm = comm
        self.position = position
        self.schedule = schedule
        self.routes = routes
        self.path = path
        self.trace_comm = comm.dup("trace")
        self.clock_sync = ClockSync(self.trace_comm)
        self.records: list[ActionRecord] = []
        self.clock_offset = self.clock_sync.measure_offset()
        self.time_origin = time.perf_counter() - elapsed_s
        comm.context.trace(True)
        if comm.rank == 0 and not elapsed_s:
            path.unlink(missing_ok=True)
        ranks = comm.allgather_object([position.replica, position.stage, comm.hosts[comm.rank]])
        if comm.rank == 0:
            self._write([event for rank in enumerate(ranks) for event in _track_names(*rank)])

    def note(self, action: Action, update: int, start: float) -> None:
        """Record an action that has just ended; `update` counts from the start of the run."""
        self.records.append(ActionRecord(action, update, start, time.perf_counter()))

    def write_segment(self, micro_batches: MicroBatchCounts) -> None:
        """Append a segment to the file. Collective over all ranks.

        Parameters
        ----------
        micro_batches : sequence of sequence of int
            Micro-batches by [replica][update] of the segment.
        """
        previous_offset, self.clock_offset = self.clock_offset, self.clock_sync.measure_offset()
        record = RankRecord(
            replica=self.position.replica,
            stage=self.position.stage,
            actions=self.records,
            waits=self.comm.context.trace(True),
            clock_offsets=(previous_offset, self.clock_offset),
        )
        self.records = []
        payloads = self._gather_to_root(record.to_json())
        if self.comm.rank == 0:
            ranks = [RankRecord.from_json(payload) for payload in payloads]
            events = [event for rank in ranks for event in self._measured_events(rank)]
            self._write(events + self._planned_events(ranks, micro_batches))

    # ---- on all ranks

    def _gather_to_root(self, payload: bytes) -> list[bytes]:
        """Return the payloads of all ranks on rank 0, nothing elsewhere. Collective over all ranks.

        Its messages are not counted as traffic.
        """
        comm, sizes = self.trace_comm, self.comm.allgather_object(len(payload))
        with self.comm.without_counting():
            if comm.rank:
                comm.isend(torch.frombuffer(bytearray(payload), dtype=torch.uint8), 0, TAG)
                comm.flush()
                return []
            payloads = [payload]
            for rank in range(1, comm.size):
                comm.post_recv(rank, TAG, [((sizes[rank],), torch.uint8)])
                message = comm.recv(rank, TAG)
                assert isinstance(message, Tensor)
                payloads.append(message.numpy().tobytes())
        return payloads

    # ---- on rank 0

    def _measured_events(self, rank: RankRecord) -> list[Event]:
        """Return a rank's actions, and its waits inside them, by rank 0's clock."""

        def seconds(local_time: float) -> float:
            return rank.global_time(local_time) - self.time_origin

        track = {"pid": rank.replica, "tid": rank.stage}
        events = [
            _event(
                str(action),
                action.kind,
                seconds(start),
                seconds(end),
                track,
                {"update": update, "micro": action.micro, "block": action.block},
            )
            for action, update, start, end in rank.actions
        ]
        return events + [
            _event("wait", "wait", seconds(start), seconds(end), track, {"for": description})
            for start, end, description in rank.waits
        ]

    def _planned_events(
        self, ranks: Sequence[RankRecord], micro_batches: MicroBatchCounts
    ) -> list[Event]:
        """Return the first updates of the segment as planned, with the measured median times."""
        place = self.position.place
        seconds = defaultdict[tuple[int, str], list[float]](list)
        for rank in ranks:
            for action, action_seconds in rank.action_seconds():
                seconds[action.block, action.kind].append(action_seconds)
        costs = []
        for block in range(len(place)):
            f, b, i, w, u = (median(seconds.get((block, kind), [0.0])) for kind in KINDS)
            costs.append(BlockCost(f, i or b, w, u))
        updates = drawn_micro_batches = 0
        while updates < len(micro_batches[0]) and drawn_micro_batches < PLANNED_MICRO_BATCHES:
            drawn_micro_batches += micro_batches[0][updates]
            updates += 1
        counts = [replica[:updates] for replica in micro_batches]
        spans = timeline(self.schedule, place, counts, self.routes, CostModel(tuple(costs)))
        starts = [
            rank.actions[0].start - rank.clock_offsets[0].offset for rank in ranks if rank.actions
        ]
        begin = min(starts, default=self.time_origin) - self.time_origin
        pid = self.position.mesh.replicas
        title = "plan, each action as long as its median"
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
        ] + [_metadata_event("process_name", {"pid": pid}, title)]

    def _write(self, events: list[Event]) -> None:
        """Append events to the file, which is complete JSON before and after."""
        lines = ",\n".join(json.dumps(event) for event in events)
        if not self.path.exists():
            self.path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            return
        with self.path.open("r+b") as file:
            file.seek(-3, 2)  # "\n]\n"
            file.write(f",\n{lines}\n]\n".encode())


def _event(name: str, kind: str, start: float, end: float, track: Event, args: Event) -> Event:
    """Return a span in Chrome's trace format: times in microseconds.

    Start and end are rounded, not the duration: a viewer drops spans that overlap, however little.
    """
    first, last = round(1e6 * start, 1), round(1e6 * end, 1)
    times = {"ts": first, "dur": round(last - first, 1)}
    return {"name": name, "cat": kind, "ph": "X", **times, **track, "args": args}


def _metadata_event(kind: str, track: Event, name: str) -> Event:
    return {"name": kind, "ph": "M", **track, "args": {"name": name}}


def _track_names(rank: int, coordinates: tuple[int, int, str]) -> list[Event]:
    """Return the events that name the tracks of a rank, given replica, stage and host."""
    replica, stage, host = coordinates
    track = {"pid": replica, "tid": stage}
    thread = _metadata_event("thread_name", track, f"stage {stage} (rank {rank} on {host})")
    return [_metadata_event("process_name", {"pid": replica}, f"replica {replica}"), thread]
