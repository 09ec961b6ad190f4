"""Forecast of a segment at given costs: time, idle time, memory and traffic of every stage.

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
from dtrain.schedules.simulator import RankCoords, Simulator, Span
from dtrain.schedules.verify import MicroBatchCounts, distinct_replicas, segment_plans

CREDITS = 2
"""Sends of a route that `comm` allows in flight beyond the posted receives."""


Number = TypeVar("Number", int, float)


@final
@dataclass(frozen=True)
class Forecast:
    """Costs of a segment; means are over the simulated replicas.

    Attributes
    ----------
    makespan_s : float
        Time until the last rank is done.
    bubble : float
        Mean idle share of the ranks: 1 - busy / (ranks x makespan).
    busy_s, wait_s : tuple of float
        Per stage, the largest over the replicas: time of its actions, and idle time between its
        first and its last action.
    live_bytes, peak_message_bytes, peak_bytes : tuple of int
        Per stage: most bytes of live micro-batches; most bytes of messages, posted receives
        included; the sum of both and of the fixed memory of its blocks, as a run counts its peak.
    messages, message_bytes : mapping of str to int
        Messages between the ranks of the replica that sends most, by the name of their link.
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
    tied_routes: Sequence[Route] = (),
) -> Forecast:
    """Simulate a whole segment at given costs.

    Replicas with equal micro-batch counts cost the same: one of each kind is simulated, and `U`
    joins the kinds.

    Parameters
    ----------
    schedule, place, micro_batches, routes
        As for `verify_schedule`, which proves a prefix; here all updates run.
    costs : CostModel
        Costs of actions, memory and messages, first those of `routes`.
    credits : int
        Sends of a route that may be in flight beyond the posted receives.
    tied_routes : sequence of Route
        As for `verify_schedule`.

    Raises
    ------
    ConfigError
        The schedule cannot run a route.
    PlanError
        The plans do not fit: a fault of the schedule.
    """
    simulator = _simulate(schedule, place, micro_batches, routes, costs, credits, tied_routes)
    return _ForecastBuilder(simulator, place, costs).build()


def timeline(
    schedule: Schedule,
    place: Sequence[int],
    micro_batches: MicroBatchCounts,
    routes: Sequence[Route],
    costs: CostModel,
    credits: int = CREDITS,
    tied_routes: Sequence[Route] = (),
) -> list[Span]:
    """Return the actions of the first replica with their times, stage by stage.

    Parameters and errors as for `forecast`.
    """
    spans = _simulate(schedule, place, micro_batches, routes, costs, credits, tied_routes).spans
    first_replica = min(replica for replica, _ in spans)
    return [span for stage in range(max(place) + 1) for span in spans[first_replica, stage]]


def _simulate(
    schedule: Schedule,
    place: Sequence[int],
    micro_batches: MicroBatchCounts,
    routes: Sequence[Route],
    costs: CostModel,
    credits: int,
    tied_routes: Sequence[Route],
) -> Simulator:
    schedule.check_routes(routes)
    replicas = distinct_replicas(micro_batches)
    plans = segment_plans(schedule, place, replicas, routes)
    every_route = (*routes, *tied_routes)
    simulator = Simulator(plans, replicas, place, every_route, costs, credits)
    simulator.run()
    return simulator


@final
class _ForecastBuilder:
    """Sums over a simulation that has run."""

    def __init__(self, simulator: Simulator, place: Sequence[int], costs: CostModel) -> None:
        self._simulator = simulator
        self._place = place
        self._stages = max(place) + 1
        self._costs = costs
        # Ends and windows of routes are the same in all stages of a replica.
        self._message_tables = {
            replica: simulator.message_tables[replica, 0] for replica in simulator.channels
        }

    def build(self) -> Forecast:
        spans = self._simulator.spans
        makespan = max((spans[rank][-1].end for rank in spans if spans[rank]), default=0)
        busy = {rank: sum(s.end - s.start for s in spans[rank]) for rank in spans}
        idle = {rank: _idle_time(spans[rank]) for rank in spans}
        live = self._max_over_replicas(
            {rank: _peak(self._live_changes(spans[rank])) for rank in spans}
        )
        in_flight = self._max_over_replicas(
            {rank: _peak(self._message_changes(*rank)) for rank in spans}
        )
        fixed: Counter[int] = Counter()
        for block, stage in enumerate(self._place):
            fixed[stage] += self._costs.blocks[block].fixed_bytes
        messages, message_bytes = max(
            map(self._traffic, self._message_tables), key=lambda traffic: traffic[0].total()
        )
        return Forecast(
            makespan_s=makespan,
            bubble=1 - sum(busy.values()) / (len(spans) * makespan) if makespan else 0.0,
            busy_s=self._max_over_replicas(busy),
            wait_s=self._max_over_replicas(idle),
            live_bytes=live,
            peak_message_bytes=in_flight,
            peak_bytes=tuple(fixed[s] + live[s] + in_flight[s] for s in range(self._stages)),
            messages=messages,
            message_bytes=message_bytes,
        )

    def _max_over_replicas(self, values: Mapping[RankCoords, Number]) -> tuple[Number, ...]:
        """Return the largest value over the replicas, per stage."""
        return tuple(
            max(values[replica, stage] for replica in self._message_tables)
            for stage in range(self._stages)
        )

    def _live_changes(self, spans: Sequence[Span]) -> Iterator[tuple[float, int]]:
        """Yield (time, change in bytes) of a rank's live micro-batches."""
        for span in spans:
            size = self._costs.blocks[span.action.block].live_bytes
            if span.action.kind == "F" and not span.action.pass_:
                yield span.start, size
            elif span.action.kind in WEIGHT_GRADIENT_KINDS:
                yield span.end, -size

    def _message_changes(self, replica: int, stage: int) -> Iterator[tuple[float, int]]:
        """Yield (time, change in bytes) of a rank's messages."""
        messages = self._message_tables[replica]
        for route, channel in enumerate(self._simulator.channels[replica]):
            size = self._costs.payload(route)
            if messages.source_stage(route) == stage:
                # A local tensor is kept until it is received, a message until it has arrived.
                ends = channel.receive_times if messages.is_local(route) else channel.arrival_times
                for start, end in zip(channel.send_times, ends, strict=True):
                    yield start, size
                    yield end, -size
            elif messages.target_stage(route) == stage and channel.send_spans:
                yield 0, size * min(messages.window(route), len(channel.send_spans))

    def _traffic(self, replica: int) -> tuple[Counter[str], Counter[str]]:
        """Return the number of messages of a replica, and their bytes, by the name of the link."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        messages = self._message_tables[replica]
        for route, channel in enumerate(self._simulator.channels[replica]):
            if not messages.is_local(route):
                ends = messages.source_stage(route), messages.target_stage(route)
                name = self._costs.links(*ends).name
                counts[name] += len(channel.send_spans)
                sizes[name] += len(channel.send_spans) * self._costs.payload(route)
        return counts, sizes


def _idle_time(spans: Sequence[Span]) -> float:
    """Return the time between a rank's actions."""
    return sum(later.start - earlier.end for earlier, later in pairwise(spans))


def _peak(changes: Iterator[tuple[float, int]]) -> int:
    """Return the most bytes at once; bytes freed at a moment can be taken at the same moment."""
    return max(accumulate(map(itemgetter(1), sorted(changes))), default=0)
