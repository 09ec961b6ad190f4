"""What a segment takes by given costs: time, waiting, memory and traffic of every stage.

Invariant: exactly the plans that would run, under the rule and the credits of `comm`; equal costs
give equal forecasts.

    stage 0 |F B F B F B U|             busy_s   the actions
    stage 1   |F B F B F B U|           wait_s   gaps between a stage's first and last action
            |<- makespan_s ->|          bubble   1 - busy / (ranks x makespan)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import TypeVar, final

from dtrain.schedules.actions import WEIGHT_GRADIENT_KINDS, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cost_model import CostModel
from dtrain.schedules.messages import MessageTable
from dtrain.schedules.simulator import RankCoords, Simulator, Span
from dtrain.schedules.verify import MicroBatchCounts, distinct_replicas, segment_plans

CREDITS = 2
"""Messages of a route that `comm` lets be under way."""


Number = TypeVar("Number", int, float)


@final
@dataclass(frozen=True)
class Forecast:
    """What a segment takes; the mean over replicas is the mean of those that were simulated.

    Parameters
    ----------
    makespan_s : float
        Until the last rank is done.
    bubble : float
        Mean idle share of the ranks: 1 - busy / (ranks x makespan).
    busy_s, wait_s : tuple of float
        Per stage, of the replica that has most of it: at work; waiting after it began.
    live_bytes, held_bytes, peak_bytes : tuple of int
        Per stage: most bytes of live micro-batches; most bytes of messages, posted receives
        included; both together with what its blocks always hold, as a run counts its peak.
    messages, message_bytes : mapping of str to int
        Messages between ranks of one replica, the largest, by the name of their link.
    """

    makespan_s: float
    bubble: float
    busy_s: tuple[float, ...]
    wait_s: tuple[float, ...]
    live_bytes: tuple[int, ...]
    peak_message_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    messages: Mapping[str, int]
    message_bytes: Mapping[str, int]


def forecast(
    schedule: Schedule,
    place: Sequence[int],
    micro_batches: MicroBatchCounts,
    routes: Sequence[Route],
    costs: CostModel,
    credits: int = CREDITS,
) -> Forecast:
    """Simulate all updates of `sizes` by given costs.

    Replicas of equal sizes cost the same: one of each kind is simulated, and `U` joins the kinds.

    Parameters
    ----------
    schedule, place, sizes, routes
        As of `check`, which proves a prefix; here everything is run.
    costs : Costs
        What it takes.
    credits : int
        Messages of a route that may be under way beyond the posted receives.

    Raises
    ------
    DtrainError
        Where the schedule cannot run a route.
    PlanError
        Where the plans do not fit: a fault of the schedule.
    """
    schedule.check_routes(routes)
    rows = distinct_replicas(micro_batches)
    course = _simulate(schedule, place, rows, routes, costs, credits)
    return _ForecastBuilder(course, rows, place, routes, costs).build(max(place) + 1)


def timeline(
    schedule: Schedule,
    place: Sequence[int],
    micro_batches: MicroBatchCounts,
    routes: Sequence[Route],
    costs: CostModel,
    credits: int = CREDITS,
) -> list[Span]:
    """Return what the first replica does when, stage by stage; arguments as of `forecast`."""
    rows = distinct_replicas(micro_batches)
    spans = _simulate(schedule, place, rows, routes, costs, credits).spans
    return [span for stage in range(max(place) + 1) for span in spans[min(rows), stage]]


def _simulate(
    schedule: Schedule,
    place: Sequence[int],
    micro_batches: Mapping[int, Sequence[int]],
    routes: Sequence[Route],
    costs: CostModel,
    credits: int,
) -> Simulator:
    plans = segment_plans(schedule, place, micro_batches, routes)
    course = Simulator(plans, micro_batches, place, routes, costs, credits)
    course.run()
    return course


@final
class _ForecastBuilder:
    """The accounts of a simulation that has run."""

    def __init__(
        self,
        simulator: Simulator,
        micro_batches: Mapping[int, Sequence[int]],
        place: Sequence[int],
        routes: Sequence[Route],
        costs: CostModel,
    ) -> None:
        self._simulator, self._place, self._routes, self._costs = simulator, place, routes, costs
        self._message_tables = {
            r: MessageTable(routes, place, 0, row) for r, row in micro_batches.items()
        }

    def build(self, stages: int) -> Forecast:
        """Return what the course took."""
        spans = self._simulator.spans
        makespan = max((spans[rank][-1].end for rank in spans if spans[rank]), default=0)
        busy = {rank: sum(s.end - s.start for s in spans[rank]) for rank in spans}
        idle = {rank: _idle_time(spans[rank]) for rank in spans}
        live = self._max_over_replicas(
            {rank: _peak(self._live_changes(spans[rank])) for rank in spans}, stages
        )
        held = self._max_over_replicas(
            {rank: _peak(self._message_changes(*rank)) for rank in spans}, stages
        )
        fixed: Counter[int] = Counter()
        for block, stage in enumerate(self._place):
            fixed[stage] += self._costs.blocks[block].fixed_bytes
        count, size = max(
            map(self._traffic, self._message_tables), key=lambda both: both[0].total()
        )
        return Forecast(
            makespan_s=makespan,
            bubble=1 - sum(busy.values()) / (len(spans) * makespan) if makespan else 0.0,
            busy_s=self._max_over_replicas(busy, stages),
            wait_s=self._max_over_replicas(idle, stages),
            live_bytes=live,
            peak_message_bytes=held,
            peak_bytes=tuple(fixed[s] + live[s] + held[s] for s in range(stages)),
            messages=count,
            message_bytes=size,
        )

    def _max_over_replicas(
        self, values: Mapping[RankCoords, Number], stages: int
    ) -> tuple[Number, ...]:
        """Return the largest value over replicas, per stage."""
        return tuple(max(values[r, stage] for r in self._message_tables) for stage in range(stages))

    def _live_changes(self, spans: Sequence[Span]) -> Iterator[tuple[float, int]]:
        """Yield when a stage's live micro-batches take bytes and give them back."""
        for span in spans:
            size = self._costs.blocks[span.action.block].live_bytes
            if span.action.kind == "F" and not span.action.pass_:
                yield span.start, size
            elif span.action.kind in WEIGHT_GRADIENT_KINDS:
                yield span.end, -size

    def _message_changes(self, replica: int, stage: int) -> Iterator[tuple[float, int]]:
        """Yield when a rank's messages take bytes and give them back."""
        mail = self._message_tables[replica]
        for route, channel in enumerate(self._simulator.channels[replica]):
            size = self._costs.payload(route)
            if mail.source_stage(route) == stage:
                # A handover is kept until it is taken, a message until it has arrived.
                ends = channel.receive_times if mail.is_local(route) else channel.arrival_times
                for start, end in zip(channel.send_times, ends, strict=True):
                    yield start, size
                    yield end, -size
            elif mail.target_stage(route) == stage and channel.send_spans:
                yield 0, size * min(mail.window(route), len(channel.send_spans))

    def _traffic(self, replica: int) -> tuple[Counter[str], Counter[str]]:
        """Return the messages, and their bytes, of a replica by the name of their link."""
        count: Counter[str] = Counter()
        total: Counter[str] = Counter()
        mail = self._message_tables[replica]
        for route, channel in enumerate(self._simulator.channels[replica]):
            if not mail.is_local(route):
                name = self._costs.links(mail.source_stage(route), mail.target_stage(route)).name
                count[name] += len(channel.send_spans)
                total[name] += len(channel.send_spans) * self._costs.payload(route)
        return count, total


def _idle_time(spans: Sequence[Span]) -> float:
    """Return the time between a rank's actions."""
    return sum(later.start - earlier.end for earlier, later in pairwise(spans))


def _peak(changes: Iterator[tuple[float, int]]) -> int:
    """Return the most bytes at once; what is given back at a moment is there for others."""
    return max(accumulate(map(itemgetter(1), sorted(changes))), default=0)
