"""Read `trace.json` of a run folder: one update as it was measured, beside its plan.

Invariant: only the end of the file is read, so a long trace costs no more than a short one.

The update is one of the last segment that the trace also has as planned. Its length is the median
of their lengths.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, final

from dtrain.checkpoint.safe_files import (
    Table,
    as_count,
    as_number,
    as_table,
    as_text,
    read_json_lines,
)
from dtrain.run_report.plan_file import DrawnAction

TRACE_FILE = "trace.json"


TRACE_BYTES = 24 * 2**20
"""Bytes of the end of the trace that are read."""


PLANNED = "planned "
"""Prefix of the categories of planned actions."""


class _Event(NamedTuple):
    """An action or a wait of the trace, in seconds."""

    replica: int
    stage: int
    start: float
    end: float
    kind: str
    label: str
    name: str
    update: int


@final
class MeasuredUpdate(NamedTuple):
    """One update as measured and as planned, in seconds from its begin.

    Attributes
    ----------
    update : int
        Its number in the run, from 0.
    measured, planned : list of DrawnAction
        Actions and waits by stage, of the first replica.
    measured_s, planned_s : float
        Lengths.
    """

    update: int
    measured: list[DrawnAction]
    planned: list[DrawnAction]
    measured_s: float
    planned_s: float


def read_measured_update(folder: Path, replicas: int) -> MeasuredUpdate | None:
    """Return one update of the trace in a run folder, None where there is no trace of one."""
    measured, planned = _last_segment(folder, replicas)
    stages = {event.stage for event in measured}
    by_update: defaultdict[int, list[_Event]] = defaultdict(list)
    for event in measured:
        by_update[event.update].append(event)
    lengths = {
        update: _span(events)
        for update, events in by_update.items()
        if update >= 0 and {event.stage for event in events if event.kind == "U"} == stages
    }
    if not lengths:
        return None
    first = min(lengths)
    if len(lengths) > 1:  # the first one fills the pipeline, and may be cut off
        del lengths[first]
    order = sorted(lengths, key=lambda update: lengths[update][1] - lengths[update][0])
    update = order[(len(order) - 1) // 2]
    begin, end = lengths[update]
    plan_begin, plan_end = _planned_span(planned, update - first)
    return MeasuredUpdate(
        update,
        _clip(measured, begin, end),
        _clip(planned, plan_begin, plan_end),
        end - begin,
        plan_end - plan_begin,
    )


def _planned_span(planned: Sequence[_Event], update: int) -> tuple[float, float]:
    """Return begin and end of an update of the plan, or of another one if it is not drawn."""
    updates = sorted({event.update for event in planned})
    if not updates:
        return 0.0, 0.0
    if update not in updates:
        update = updates[len(updates) // 2]
    return _span([event for event in planned if event.update == update])


def _last_segment(folder: Path, replicas: int) -> tuple[list[_Event], list[_Event]]:
    """Return the measured events of the first replica and the planned events in the last segment
    of the trace. The planned ones follow the measured ones of their segment."""
    measured: list[_Event] = []
    planned: list[_Event] = []
    for table in read_json_lines(folder, TRACE_FILE, TRACE_BYTES):
        event = _event(table)
        if event is None:
            continue
        if event.kind.startswith(PLANNED):
            planned.append(event)
            continue
        if planned:
            measured, planned = [], []
        if event.replica == 0 and event.replica < replicas:
            measured.append(event)
    return measured, list(_with_updates(planned))


def _event(table: Table) -> _Event | None:
    """Return an action or a wait of the trace, None for other events."""
    start, length = as_number(table.get("ts")), as_number(table.get("dur"))
    replica, stage = as_count(table.get("pid")), as_count(table.get("tid"))
    if start is None or length is None or replica is None or stage is None or length < 0:
        return None
    fields, kind = as_table(table.get("args")), as_text(table.get("cat"))
    micro = as_count(fields.get("micro"))
    update, name = as_count(fields.get("update")), as_text(table.get("name"))
    return _Event(
        replica,
        stage,
        start / 1e6,
        (start + length) / 1e6,
        kind,
        "" if micro is None else str(micro),
        name,
        -1 if update is None else update,
    )


def _with_updates(planned: Sequence[_Event]) -> Iterator[_Event]:
    """Yield the planned events with their updates, which the trace does not hold: each name, such
    as "F0.1", occurs once in every update."""
    counts: Counter[str] = Counter()
    for event in sorted(planned, key=lambda event: event.start):
        kind = event.kind.removeprefix(PLANNED)
        yield event._replace(kind=kind, update=counts[event.name])
        counts[event.name] += 1


def _span(events: Sequence[_Event]) -> tuple[float, float]:
    """Return begin and end of events."""
    return min(event.start for event in events), max(event.end for event in events)


def _clip(events: Sequence[_Event], begin: float, end: float) -> list[DrawnAction]:
    """Return the parts of events between two times, relative to the first; waits come last."""
    drawn = [
        DrawnAction(
            event.stage,
            max(event.start, begin) - begin,
            min(event.end, end) - begin,
            _drawn_kind(event),
            event.label,
        )
        for event in events
        if event.end > begin and event.start < end and event.kind
    ]
    return sorted(drawn, key=lambda action: (action.kind == "wait", action.row, action.start))


def _drawn_kind(event: _Event) -> str:
    """Return the kind of a drawn action."""
    if event.kind == "F" and "/" in event.name:
        return "again"
    return "B" if event.kind == "I" else event.kind


def waiting_by_stage(actions: Sequence[DrawnAction]) -> dict[int, float]:
    """Return the seconds of waits by stage."""
    seconds: defaultdict[int, float] = defaultdict(float)
    for action in actions:
        if action.kind == "wait":
            seconds[action.row] += action.end - action.start
    return dict(seconds)
