"""Prove that the plans of all ranks fit each other, and say what they cost.

Invariant: what `check` accepts runs to its end under `comm`'s rule without any credit, hence with
any number of them, whatever the timing (see `simulate`).

What is proved is a prefix of the segment: its first updates, until there are three of them and the
pipeline was filled twice (2 x stages micro-batches; where something flows back, 2 x blocks there
and back, and the longest lag twice), then the first update of every further kind (sizes over the
replicas). Plans repeat update by update and no channel holds more than its posted receives, so
what follows repeats what was seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import final

from dtrain.schedules.actions import (
    INPUT_GRADIENT_KINDS,
    SPLIT_KINDS,
    UNSPLIT_KINDS,
    WEIGHT_GRADIENT_KINDS,
    Action,
    Point,
    Route,
)
from dtrain.schedules.base import Schedule, blocks_of_stage
from dtrain.schedules.cyclic import feeds_back
from dtrain.schedules.messages import count_forward_passes
from dtrain.schedules.simulator import ActionList, PlanError, Simulator, Span

__all__ = [
    "MicroBatchCounts",
    "PlanError",
    "ScheduleReport",
    "distinct_replicas",
    "segment_plans",
    "verify_plans",
    "verify_schedule",
]


MicroBatchCounts = Sequence[Sequence[int]]
"""Micro-batches by [replica][update]."""


@final
@dataclass(frozen=True)
class ScheduleReport:
    """What plans cost, in units: F = I = W = 1, B = 2, U = 0, hops 0.

    Parameters
    ----------
    peak_live : tuple of int
        Per stage: most micro-batches whose first `F` ran in a block and whose `B`, or `W`, has not.
    staleness : tuple of int
        Per stage: most updates of a block between the first `F` and the `B`, or `I`, of one
        micro-batch.
    bubble : float
        Mean idle share of the ranks: 1 - busy / (ranks x makespan).
    makespan : int
        Units until the last rank is done.
    messages : int
        Messages between ranks; replicas of equal plans count once.
    timeline : tuple of Span
        What the first replica does when, stage by stage.
    """

    peak_live: tuple[int, ...]
    staleness: tuple[int, ...]
    bubble: float
    makespan: int
    messages: int
    timeline: tuple[Span, ...]


def verify_schedule(
    schedule: Schedule,
    place: Sequence[int],
    micro_batches: MicroBatchCounts,
    routes: Sequence[Route],
) -> ScheduleReport:
    """Prove a schedule on a prefix of a segment.

    Replicas of equal sizes have equal plans, since plans are pure: one of each kind is simulated,
    and `U` joins the kinds.

    Parameters
    ----------
    schedule : Schedule
        The order to prove.
    place : sequence of int
        `place[b]` is the stage of block b.
    sizes : sequence of sequence of int
        Micro-batches by [replica][update] of the segment.
    routes : sequence of Route
        What flows between actions.

    Raises
    ------
    DtrainError
        Where the schedule cannot run a route.
    PlanError
        Where the plans do not fit: a fault of the schedule.
    """
    schedule.check_routes(routes)
    rows = distinct_replicas(_prefix(micro_batches, *_prefix_length(place, routes)))
    return _prove(segment_plans(schedule, place, rows, routes), rows, place, routes)


def verify_plans(
    plans: Sequence[Sequence[ActionList]], place: Sequence[int], routes: Sequence[Route]
) -> ScheduleReport:
    """Prove explicit plans, `plans[replica][stage]`; block 0 says which micro-batches there are.

    Raises
    ------
    PlanError
        At the first fault; it names stage, position (from 0) and action.
    """
    for stages in plans:
        if len(stages) != max(place) + 1:
            raise PlanError(f"{len(stages)} plans for {max(place) + 1} stages")
    updates = 1 + max((a.update for stages in plans for plan in stages for a in plan), default=-1)
    sizes: dict[int, list[int]] = {}
    for replica, stages in enumerate(plans):
        begun = (a for a in stages[place[0]] if (a.kind, a.block, a.pass_) == ("F", 0, 0))
        first = Counter(action.update for action in begun)
        sizes[replica] = [first[update] for update in range(updates)]
    return _prove(dict(enumerate(plans)), sizes, place, routes)


def distinct_replicas(micro_batches: MicroBatchCounts) -> dict[int, tuple[int, ...]]:
    """Return the first replica of each kind with its sizes."""
    rows: dict[tuple[int, ...], int] = {}
    for replica, row in enumerate(micro_batches):
        rows.setdefault(tuple(row), replica)
    return {replica: row for row, replica in rows.items()}


def segment_plans(
    schedule: Schedule,
    place: Sequence[int],
    micro_batches: Mapping[int, Sequence[int]],
    routes: Sequence[Route],
) -> dict[int, list[ActionList]]:
    """Return the plans of the replicas in `rows` (sizes by replica), stage by stage."""
    stages = range(max(place) + 1)
    return {
        replica: [tuple(schedule.plan(stage, place, row, routes)) for stage in stages]
        for replica, row in micro_batches.items()
    }


def _prefix_length(place: Sequence[int], routes: Sequence[Route]) -> tuple[int, int]:
    """Return the micro-batches that fill the pipeline twice, and the updates of the longest lag."""
    micros = 4 * len(place) if feeds_back(routes) else 2 * (max(place) + 1)
    return micros, max((route.lag for route in routes), default=0)


def _prefix(micro_batches: MicroBatchCounts, micros: int, lag: int) -> list[tuple[int, ...]]:
    """Return the part of `sizes` that is proved: see the module."""
    columns = list(zip(*micro_batches, strict=True))
    filled = accumulate(max(column) for column in columns)
    first = max(3, 1 + sum(total < micros for total in filled)) + 2 * lag
    kinds = dict.fromkeys(columns[:first])
    further = [column for column in dict.fromkeys(columns[first:]) if column not in kinds]
    kept = columns[:first] + further
    return [tuple(column[replica] for column in kept) for replica in range(len(micro_batches))]


def _prove(
    plans: Mapping[int, Sequence[ActionList]],
    micro_batches: Mapping[int, Sequence[int]],
    place: Sequence[int],
    routes: Sequence[Route],
) -> ScheduleReport:
    """Check each plan by itself, then all together; return what was seen."""
    for replica, stages in plans.items():
        for stage, plan in enumerate(stages):
            where = f"stage {stage}" if len(plans) == 1 else f"replica {replica} stage {stage}"
            ledger = _PlanChecker(
                blocks_of_stage(stage, place),
                micro_batches[replica],
                count_forward_passes(routes),
                plan,
            )
            _check_complete(where, plan, ledger)
    course = Simulator(plans, micro_batches, place, routes)
    course.run()
    return _report(plans, course)


def _report(plans: Mapping[int, Sequence[ActionList]], simulator: Simulator) -> ScheduleReport:
    """Gather what plans and their simulation say."""
    spans = [span for rank in simulator.spans.values() for span in rank]
    makespan = int(max((span.end for span in spans), default=0))
    busy = sum(span.end - span.start for span in spans)
    columns = list(zip(*plans.values(), strict=True))
    first = [simulator.spans[min(plans), stage] for stage in range(len(columns))]
    return ScheduleReport(
        peak_live=tuple(max(map(_peak_live, column)) for column in columns),
        staleness=tuple(max(map(_staleness, column)) for column in columns),
        bubble=1 - busy / (len(simulator.spans) * makespan) if makespan else 0.0,
        makespan=makespan,
        messages=simulator.messages,
        timeline=tuple(chain.from_iterable(first)),
    )


def _peak_live(plan: ActionList) -> int:
    """Return the most micro-batches that are live at once in a plan."""
    live: Counter[tuple[int, int]] = Counter()
    peak = 0
    for action in plan:
        micro = action.update, action.micro
        if action.kind == "F" and not action.pass_:
            live[micro] += 1
            peak = max(peak, len(live))
        elif action.kind in WEIGHT_GRADIENT_KINDS:
            live[micro] -= 1
            if not live[micro]:
                del live[micro]
    return peak


def _staleness(plan: ActionList) -> int:
    """Return the most updates of a block between first `F` and `B` (or `I`) of one micro-batch."""
    version: Counter[int] = Counter()
    seen: dict[tuple[int, int, int], int] = {}
    stale = 0
    for action in plan:
        block, micro = action.block, (action.block, action.update, action.micro)
        if action.kind == "F" and not action.pass_:
            seen[micro] = version[block]
        elif action.kind in INPUT_GRADIENT_KINDS:
            stale = max(stale, version[block] - seen.pop(micro))
        elif action.kind == "U":
            version[block] += 1
    return stale


def _check_complete(location: str, plan: ActionList, checker: _PlanChecker) -> None:
    """Raise where a plan leaves something out, does it twice or in the wrong order."""
    for position, action in enumerate(plan):
        fault = checker.fault(action)
        if fault:
            at = f"at {action} of update {action.update} (position {position})"
            raise PlanError(f"{location} {at}: {fault}")
        checker.counts[action.block, action.kind, action.pass_] += 1
    for point in checker.points:
        due = checker.next_action(point)
        if due:
            end = f"the plan ends at position {len(plan)}"
            raise PlanError(f"{location}: {due} of update {due.update} is missing, {end}")


@final
class _PlanChecker:
    """How many actions of each point a stage's blocks have done, out of what `sizes` asks.

    Every block goes through its points in order: its passes of `F`, then `B`, or `I` and `W` where
    the plan splits it, then `U`.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        micro_batches: Sequence[int],
        forward_passes: int,
        plan: ActionList,
    ) -> None:
        split = {action.block for action in plan if action.kind in ("I", "W")}
        self.points = [
            Point(block, kind, pass_)
            for block in blocks
            for kind in (SPLIT_KINDS if block in split else UNSPLIT_KINDS)
            for pass_ in range(forward_passes if kind == "F" else 1)
        ]
        self.counts: dict[tuple[int, str, int], int] = dict.fromkeys(self.points, 0)
        self._predecessor = dict(zip(self.points[1:], self.points, strict=False))
        self._micro_batches = [
            (u, micro) for u, size in enumerate(micro_batches) for micro in range(size)
        ]
        self._update_ends = list(accumulate(micro_batches))

    def next_action(self, point: Point) -> Action | None:
        """Return the next action of a point: micro-batches and updates in order."""
        count, (block, kind, pass_) = self.counts[point], point
        if kind == "U":
            return Action(kind, block, count) if count < len(self._update_ends) else None
        clock = self._micro_batches
        return Action(kind, block, *clock[count], pass_) if count < len(clock) else None

    def fault(self, action: Action) -> str:
        """Return why an action must not come now, or an empty text."""
        point = Point(action.block, action.kind, action.pass_)
        if point not in self.counts:
            return f"block {action.block} has no {point.kind} on this stage"
        due = self.next_action(point)
        if due is None:
            return f"every {point} is done already"
        if action != due:
            return f"{due} of update {due.update} comes first"
        before = self._predecessor.get(point, point)
        if action.kind == "U":
            late = self.counts[before] < self._update_ends[action.update]
            return f"{self.next_action(before)} has not run" if late else ""
        first = (action.kind, action.pass_) == ("F", 0)
        if not first and self.counts[before] <= self.counts[point]:
            return f"its {before.kind} has not run"
        return ""
