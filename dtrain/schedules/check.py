"""Prove that the plans of all ranks fit each other, and say what they cost.

Invariant: what `check` accepts runs to its end under `comm`'s rule without any credit, hence with
any number of them, whatever the timing (see `simulate`).

What is proved is a prefix of the segment: its first updates, until there are three of them and the
pipeline was filled twice (2 x stages micro-batches), then the first update of every further kind
(sizes over the replicas). Plans repeat update by update and no channel holds more than its posted
receive, so what follows repeats what was seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import final

from dtrain.schedules.action import Action, Route
from dtrain.schedules.schedule import Schedule, owned
from dtrain.schedules.simulate import Plan, PlanError, Simulation, Span

__all__ = ["PlanError", "Report", "check", "verify"]

Sizes = Sequence[Sequence[int]]
"""Micro-batches by [replica][update]."""


@final
@dataclass(frozen=True)
class Report:
    """What plans cost, in units: F = 1, B = 2, U = 0, hops 0.

    Parameters
    ----------
    peak_live : tuple of int
        Per stage: most micro-batches whose `F` ran in a block and whose `B` has not.
    staleness : tuple of int
        Per stage: most updates of a block between `F` and `B` of the same micro-batch.
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


def check(
    schedule: Schedule, place: Sequence[int], sizes: Sizes, routes: Sequence[Route]
) -> Report:
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
    Refusal
        Where the schedule cannot run a route.
    PlanError
        Where the plans do not fit: a fault of the schedule.
    """
    schedule.admit(routes)
    stages = max(place) + 1
    rows: dict[tuple[int, ...], int] = {}
    for replica, row in enumerate(_prefix(sizes, 2 * stages)):
        rows.setdefault(row, replica)
    plans = {
        replica: [tuple(schedule.plan(s, place, row, routes)) for s in range(stages)]
        for row, replica in rows.items()
    }
    return _prove(plans, {replica: row for row, replica in rows.items()}, place, routes)


def verify(
    plans: Sequence[Sequence[Plan]], place: Sequence[int], routes: Sequence[Route]
) -> Report:
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
        first = Counter(a.update for a in stages[place[0]] if a.kind == "F" and a.block == 0)
        sizes[replica] = [first[update] for update in range(updates)]
    return _prove(dict(enumerate(plans)), sizes, place, routes)


def _prefix(sizes: Sizes, micros: int) -> list[tuple[int, ...]]:
    """Return the part of `sizes` that is proved: see the module."""
    columns = list(zip(*sizes, strict=True))
    filled = accumulate(max(column) for column in columns)
    first = max(3, 1 + sum(total < micros for total in filled))
    kinds = dict.fromkeys(columns[:first])
    further = [column for column in dict.fromkeys(columns[first:]) if column not in kinds]
    kept = columns[:first] + further
    return [tuple(column[replica] for column in kept) for replica in range(len(sizes))]


def _prove(
    plans: Mapping[int, Sequence[Plan]],
    sizes: Mapping[int, Sequence[int]],
    place: Sequence[int],
    routes: Sequence[Route],
) -> Report:
    """Check each plan by itself, then all together; return what was seen."""
    for replica, stages in plans.items():
        for stage, plan in enumerate(stages):
            where = f"stage {stage}" if len(plans) == 1 else f"replica {replica} stage {stage}"
            _complete(where, plan, stage, place, sizes[replica])
    course = Simulation(plans, place, routes)
    course.run()
    return _report(plans, course)


def _report(plans: Mapping[int, Sequence[Plan]], course: Simulation) -> Report:
    """Gather what plans and their simulation say."""
    spans = [span for rank in course.spans.values() for span in rank]
    makespan = max((span.end for span in spans), default=0)
    busy = sum(span.end - span.start for span in spans)
    columns = list(zip(*plans.values(), strict=True))
    first = [course.spans[min(plans), stage] for stage in range(len(columns))]
    return Report(
        peak_live=tuple(max(map(_live, column)) for column in columns),
        staleness=tuple(max(map(_stale, column)) for column in columns),
        bubble=1 - busy / (len(course.spans) * makespan) if makespan else 0.0,
        makespan=makespan,
        messages=course.messages,
        timeline=tuple(chain.from_iterable(first)),
    )


def _live(plan: Plan) -> int:
    """Return the most micro-batches that are live at once in a plan."""
    live: Counter[tuple[int, int]] = Counter()
    peak = 0
    for action in plan:
        micro = action.update, action.micro
        if action.kind == "F":
            live[micro] += 1
            peak = max(peak, len(live))
        elif action.kind == "B":
            live[micro] -= 1
            if not live[micro]:
                del live[micro]
    return peak


def _stale(plan: Plan) -> int:
    """Return the most updates of a block between `F` and `B` of one micro-batch."""
    version: Counter[int] = Counter()
    seen: dict[tuple[int, int, int], int] = {}
    stale = 0
    for action in plan:
        if action.kind == "F":
            seen[action[1:]] = version[action.block]
        elif action.kind == "B":
            stale = max(stale, version[action.block] - seen.pop(action[1:]))
        else:
            version[action.block] += 1
    return stale


def _complete(
    where: str, plan: Plan, stage: int, place: Sequence[int], sizes: Sequence[int]
) -> None:
    """Raise where a plan leaves something out, does it twice or in the wrong order."""
    ledger = _Ledger(owned(stage, place), sizes)
    for position, action in enumerate(plan):
        fault = ledger.fault(action)
        if fault:
            at = f"at {action} of update {action.update} (position {position})"
            raise PlanError(f"{where} {at}: {fault}")
        ledger.done[action.kind, action.block] += 1
    for kind, block in ledger.done:
        due = ledger.due(kind, block)
        if due:
            end = f"the plan ends at position {len(plan)}"
            raise PlanError(f"{where}: {due} of update {due.update} is missing, {end}")


@final
class _Ledger:
    """How many actions of each kind a stage's blocks have done, out of what `sizes` asks."""

    def __init__(self, blocks: Sequence[int], sizes: Sequence[int]) -> None:
        self.done = {(kind, block): 0 for block in blocks for kind in "FBU"}
        self._clock = [(u, micro) for u, size in enumerate(sizes) for micro in range(size)]
        self._ends = list(accumulate(sizes))

    def due(self, kind: str, block: int) -> Action | None:
        """Return the next action of a kind in a block: micro-batches and updates in order."""
        count = self.done[kind, block]
        if kind == "U":
            return Action(kind, block, count) if count < len(self._ends) else None
        return Action(kind, block, *self._clock[count]) if count < len(self._clock) else None

    def fault(self, action: Action) -> str:
        """Return why an action must not come now, or an empty text."""
        kind, block = action.kind, action.block
        if (kind, block) not in self.done:
            return f"block {block} has no {kind} on this stage"
        due = self.due(kind, block)
        if due is None:
            return f"every {kind}{block} is done already"
        if action != due:
            return f"{due} of update {due.update} comes first"
        if kind == "B" and self.done["F", block] <= self.done["B", block]:
            return "its F has not run"
        if kind == "U" and self.done["B", block] < self._ends[action.update]:
            return f"{self.due('B', block)} has not run"
        return ""
