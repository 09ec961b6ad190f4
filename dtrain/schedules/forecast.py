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

from dtrain.schedules.action import Route
from dtrain.schedules.check import Sizes, groups, planned
from dtrain.schedules.costs import Costs
from dtrain.schedules.messages import Messages
from dtrain.schedules.schedule import Schedule
from dtrain.schedules.simulate import Rank, Simulation, Span

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
    held_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    messages: Mapping[str, int]
    message_bytes: Mapping[str, int]


def forecast(
    schedule: Schedule,
    place: Sequence[int],
    sizes: Sizes,
    routes: Sequence[Route],
    costs: Costs,
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
    Refusal
        Where the schedule cannot run a route.
    PlanError
        Where the plans do not fit: a fault of the schedule.
    """
    schedule.admit(routes)
    rows = groups(sizes)
    course = _simulated(schedule, place, rows, routes, costs, credits)
    return _Books(course, rows, place, routes, costs).forecast(max(place) + 1)


def timeline(
    schedule: Schedule,
    place: Sequence[int],
    sizes: Sizes,
    routes: Sequence[Route],
    costs: Costs,
    credits: int = CREDITS,
) -> list[Span]:
    """Return what the first replica does when, stage by stage; arguments as of `forecast`."""
    rows = groups(sizes)
    spans = _simulated(schedule, place, rows, routes, costs, credits).spans
    return [span for stage in range(max(place) + 1) for span in spans[min(rows), stage]]


def _simulated(
    schedule: Schedule,
    place: Sequence[int],
    rows: Mapping[int, Sequence[int]],
    routes: Sequence[Route],
    costs: Costs,
    credits: int,
) -> Simulation:
    plans = planned(schedule, place, rows, routes)
    course = Simulation(plans, rows, place, routes, costs, credits)
    course.run()
    return course


@final
class _Books:
    """The accounts of a simulation that has run."""

    def __init__(
        self,
        course: Simulation,
        sizes: Mapping[int, Sequence[int]],
        place: Sequence[int],
        routes: Sequence[Route],
        costs: Costs,
    ) -> None:
        self._course, self._place, self._routes, self._costs = course, place, routes, costs
        self._mail = {r: Messages(routes, place, 0, row) for r, row in sizes.items()}

    def forecast(self, stages: int) -> Forecast:
        """Return what the course took."""
        spans = self._course.spans
        makespan = max((spans[rank][-1].end for rank in spans if spans[rank]), default=0)
        busy = {rank: sum(s.end - s.start for s in spans[rank]) for rank in spans}
        idle = {rank: _gaps(spans[rank]) for rank in spans}
        live = self._most({rank: _peak(self._live(spans[rank])) for rank in spans}, stages)
        held = self._most({rank: _peak(self._held(*rank)) for rank in spans}, stages)
        fixed: Counter[int] = Counter()
        for block, stage in enumerate(self._place):
            fixed[stage] += self._costs.blocks[block].fixed_bytes
        count, size = max(map(self._traffic, self._mail), key=lambda both: both[0].total())
        return Forecast(
            makespan_s=makespan,
            bubble=1 - sum(busy.values()) / (len(spans) * makespan) if makespan else 0.0,
            busy_s=self._most(busy, stages),
            wait_s=self._most(idle, stages),
            live_bytes=live,
            held_bytes=held,
            peak_bytes=tuple(fixed[s] + live[s] + held[s] for s in range(stages)),
            messages=count,
            message_bytes=size,
        )

    def _most(self, values: Mapping[Rank, Number], stages: int) -> tuple[Number, ...]:
        """Return the largest value over replicas, per stage."""
        return tuple(max(values[r, stage] for r in self._mail) for stage in range(stages))

    def _live(self, spans: Sequence[Span]) -> Iterator[tuple[float, int]]:
        """Yield when a stage's live micro-batches take bytes and give them back."""
        for span in spans:
            size = self._costs.blocks[span.action.block].live_bytes
            if span.action.kind == "F" and not span.action.pass_:
                yield span.start, size
            elif span.action.kind in "BW":
                yield span.end, -size

    def _held(self, replica: int, stage: int) -> Iterator[tuple[float, int]]:
        """Yield when a rank's messages take bytes and give them back."""
        mail = self._mail[replica]
        for route, channel in enumerate(self._course.channels[replica]):
            size = self._costs.payload(route)
            if mail.source(route) == stage:
                # A handover is kept until it is taken, a message until it has arrived.
                ends = channel.taken if mail.local(route) else channel.came
                for start, end in zip(channel.left, ends, strict=True):
                    yield start, size
                    yield end, -size
            elif mail.target(route) == stage and channel.sent:
                yield 0, size * min(mail.window(route), len(channel.sent))

    def _traffic(self, replica: int) -> tuple[Counter[str], Counter[str]]:
        """Return the messages, and their bytes, of a replica by the name of their link."""
        count: Counter[str] = Counter()
        total: Counter[str] = Counter()
        mail = self._mail[replica]
        for route, channel in enumerate(self._course.channels[replica]):
            if not mail.local(route):
                name = self._costs.links(mail.source(route), mail.target(route)).name
                count[name] += len(channel.sent)
                total[name] += len(channel.sent) * self._costs.payload(route)
        return count, total


def _gaps(spans: Sequence[Span]) -> float:
    """Return the time between a rank's actions."""
    return sum(later.start - earlier.end for earlier, later in pairwise(spans))


def _peak(changes: Iterator[tuple[float, int]]) -> int:
    """Return the most bytes at once; what is given back at a moment is there for others."""
    return max(accumulate(map(itemgetter(1), sorted(changes))), default=0)
