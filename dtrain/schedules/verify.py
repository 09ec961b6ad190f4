"""Prove that the plans of all ranks fit each other, and report what they cost.

Invariant: plans that `verify_schedule` accepts run to their end under `comm`'s rule without any
credit, hence with any number of credits, whatever the timing (see `simulator`).

A prefix of the segment is proved. It begins with at least three updates that fill the pipeline
twice (2 x stages micro-batches, or 4 x blocks if a route flows back), and with as many updates more
as twice the longest lag. The first update of every further kind follows (a kind is the micro-batch
counts of all replicas). Plans repeat update by update and no channel holds more than its posted
receives, so the rest of the segment repeats the prefix. A route with a period above its lag is
proved with a shorter one, which has as many messages in flight.
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
    Kind,
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
"""Number of micro-batches by [replica][update]."""


@final
@dataclass(frozen=True)
class ScheduleReport:
    """Costs of proved plans in units: F = I = W = 1, B = 2, U = 0, messages 0.

    Attributes
    ----------
    peak_live : tuple of int
        Per stage: most micro-batches after their first `F` and before their last `B`, or `W`.
    staleness : tuple of int
        Per stage: most updates of a block between the first `F` and the `B`, or `I`, of one
        micro-batch.
    bubble : float
        Mean idle share of the ranks: 1 - busy / (ranks x makespan).
    makespan : int
        Units until the last rank is done.
    messages : int
        Messages between ranks; replicas with equal plans count once.
    timeline : tuple of Span
        The actions of the first replica with their times, stage by stage.
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
    tied_routes: Sequence[Route] = (),
) -> ScheduleReport:
    """Prove a schedule on a prefix of a segment.

    Replicas with equal micro-batch counts have equal plans: one of each kind is simulated, and `U`
    joins the kinds.

    Parameters
    ----------
    schedule : Schedule
        The schedule to prove.
    place : sequence of int
        `place[b]` is the stage of block b.
    micro_batches : sequence of sequence of int
        Number of micro-batches by [replica][update] of the segment.
    routes : sequence of Route
        All routes of the model.
    tied_routes : sequence of Route
        Routes of the gradients of tied parameters: they have no influence on the plans.

    Raises
    ------
    ConfigError
        The schedule cannot run a route.
    PlanError
        The plans do not fit: a fault of the schedule.
    """
    schedule.check_routes(routes)
    routes = [route._replace(every=min(route.every, route.lag + 1)) for route in routes]
    every_route = (*routes, *tied_routes)
    replicas = distinct_replicas(_prefix(micro_batches, *_prefix_length(place, every_route)))
    return _prove(segment_plans(schedule, place, replicas, routes), replicas, place, every_route)


def verify_plans(
    plans: Sequence[Sequence[ActionList]], place: Sequence[int], routes: Sequence[Route]
) -> ScheduleReport:
    """Prove explicit plans, `plans[replica][stage]`.

    The forwards of block 0 define which micro-batches exist.

    Raises
    ------
    PlanError
        The first fault; it names stage, position (from 0) and action.
    """
    for stages in plans:
        if len(stages) != max(place) + 1:
            message = f"{len(stages)} plans for {max(place) + 1} stages"
            raise PlanError("plan.stage-count", message)
    updates = 1 + max((a.update for stages in plans for plan in stages for a in plan), default=-1)
    micro_batches: dict[int, list[int]] = {}
    for replica, stages in enumerate(plans):
        forwards = (a for a in stages[place[0]] if (a.kind, a.block, a.pass_) == ("F", 0, 0))
        counts = Counter(action.update for action in forwards)
        micro_batches[replica] = [counts[update] for update in range(updates)]
    return _prove(dict(enumerate(plans)), micro_batches, place, routes)


def distinct_replicas(micro_batches: MicroBatchCounts) -> dict[int, tuple[int, ...]]:
    """Return the micro-batch counts of the first replica of each kind, by replica."""
    replicas: dict[tuple[int, ...], int] = {}
    for replica, counts in enumerate(micro_batches):
        replicas.setdefault(tuple(counts), replica)
    return {replica: counts for counts, replica in replicas.items()}


def segment_plans(
    schedule: Schedule,
    place: Sequence[int],
    micro_batches: Mapping[int, Sequence[int]],
    routes: Sequence[Route],
) -> dict[int, list[ActionList]]:
    """Return the plans of the replicas in `micro_batches`, stage by stage."""
    stages = range(max(place) + 1)
    return {
        replica: [tuple(schedule.plan(stage, place, counts, routes)) for stage in stages]
        for replica, counts in micro_batches.items()
    }


def _prefix_length(place: Sequence[int], routes: Sequence[Route]) -> tuple[int, int]:
    """Return how many micro-batches fill the pipeline twice, and the longest lag in updates."""
    micros = 4 * len(place) if feeds_back(routes) else 2 * (max(place) + 1)
    return micros, max((route.lag for route in routes), default=0)


def _prefix(micro_batches: MicroBatchCounts, micros: int, lag: int) -> list[tuple[int, ...]]:
    """Return the micro-batch counts of the prefix that is proved: see the module's docstring."""
    updates = list(zip(*micro_batches, strict=True))
    totals = accumulate(max(counts) for counts in updates)
    start = max(3, 1 + sum(total < micros for total in totals)) + 2 * lag
    kinds = dict.fromkeys(updates[:start])
    further = [counts for counts in dict.fromkeys(updates[start:]) if counts not in kinds]
    prefix = updates[:start] + further
    return [tuple(counts[replica] for counts in prefix) for replica in range(len(micro_batches))]


def _prove(
    plans: Mapping[int, Sequence[ActionList]],
    micro_batches: Mapping[int, Sequence[int]],
    place: Sequence[int],
    routes: Sequence[Route],
) -> ScheduleReport:
    """Check each plan by itself, then simulate all together."""
    for replica, stages in plans.items():
        for stage, plan in enumerate(stages):
            location = f"stage {stage}" if len(plans) == 1 else f"replica {replica} stage {stage}"
            checker = _PlanChecker(
                blocks_of_stage(stage, place),
                micro_batches[replica],
                count_forward_passes(routes),
                plan,
            )
            _check_complete(location, plan, checker)
    simulator = Simulator(plans, micro_batches, place, routes)
    simulator.run()
    return _report(plans, simulator)


def _report(plans: Mapping[int, Sequence[ActionList]], simulator: Simulator) -> ScheduleReport:
    spans = [span for rank_spans in simulator.spans.values() for span in rank_spans]
    makespan = int(max((span.end for span in spans), default=0))
    busy = sum(span.end - span.start for span in spans)
    stage_plans = list(zip(*plans.values(), strict=True))
    first_replica = [simulator.spans[min(plans), stage] for stage in range(len(stage_plans))]
    return ScheduleReport(
        peak_live=tuple(max(map(_peak_live, replicas)) for replicas in stage_plans),
        staleness=tuple(max(map(_staleness, replicas)) for replicas in stage_plans),
        bubble=1 - busy / (len(simulator.spans) * makespan) if makespan else 0.0,
        makespan=makespan,
        messages=simulator.messages,
        timeline=tuple(chain.from_iterable(first_replica)),
    )


def _peak_live(plan: ActionList) -> int:
    """Return the most micro-batches of a plan that are live at once."""
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
    forward_version: dict[tuple[int, int, int], int] = {}
    staleness = 0
    for action in plan:
        if action.kind == "F" and not action.pass_:
            forward_version[action.key] = version[action.block]
        elif action.kind in INPUT_GRADIENT_KINDS:
            delay = version[action.block] - forward_version.pop(action.key)
            staleness = max(staleness, delay)
        elif action.kind == "U":
            version[action.block] += 1
    return staleness


def _check_complete(location: str, plan: ActionList, checker: _PlanChecker) -> None:
    """Raise a `PlanError` for an action that is missing, repeated or out of order."""
    for position, action in enumerate(plan):
        fault = checker.fault(action)
        if fault:
            key, text = fault
            at = f"at {action} of update {action.update} (position {position})"
            raise PlanError(key, f"{location} {at}: {text}")
        checker.counts[action.block, action.kind, action.pass_] += 1
    for point in checker.points:
        missing = checker.next_action(point)
        if missing:
            raise PlanError(
                "plan.missing-action",
                f"{location}: {missing} of update {missing.update} is missing, the plan ends at "
                f"position {len(plan)}",
            )


@final
class _PlanChecker:
    """Count the actions of each point of a stage and find the first that is out of order.

    Every block runs the points of a micro-batch in order: the passes of `F`, then `B`, or `I` and
    `W` where the plan splits it, then `U`.
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
        self.counts: dict[tuple[int, Kind, int], int] = dict.fromkeys(self.points, 0)
        self._predecessor = dict(zip(self.points[1:], self.points, strict=False))
        self._micro_batches = [
            (update, micro) for update, count in enumerate(micro_batches) for micro in range(count)
        ]
        self._update_ends = list(accumulate(micro_batches))

    def next_action(self, point: Point) -> Action | None:
        """Return the next action of a point: micro-batches and updates in order."""
        count, (block, kind, pass_) = self.counts[point], point
        if kind == "U":
            return Action(kind, block, count) if count < len(self._update_ends) else None
        if count >= len(self._micro_batches):
            return None
        return Action(kind, block, *self._micro_batches[count], pass_)

    def fault(self, action: Action) -> tuple[str, str] | None:
        """Return key and text of the fault if `action` cannot be next, else None."""
        point = Point(action.block, action.kind, action.pass_)
        if point not in self.counts:
            text = f"block {action.block} has no {point.kind} on this stage"
            return "plan.unknown-action", text
        expected = self.next_action(point)
        if expected is None:
            return "plan.repeated-action", f"every {point} is done already"
        if action != expected:
            return "plan.wrong-order", f"{expected} of update {expected.update} must be before it"
        before = self._predecessor.get(point, point)
        if action.kind == "U":
            if self.counts[before] < self._update_ends[action.update]:
                return "plan.too-early", f"{self.next_action(before)} has not run"
            return None
        is_first = (action.kind, action.pass_) == ("F", 0)
        if not is_first and self.counts[before] <= self.counts[point]:
            return "plan.too-early", f"its {before.kind} has not run"
        return None
