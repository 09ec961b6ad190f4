"""Cycles: orders that follow from the routes alone, whatever flows forward or back.

Invariant: an action runs in cycle (micro-batches so far) + (offset of its point), and the offsets
are the longest path over the routes. So each block does the same things in the same order on any
number of ranks, and messages wait for nothing that comes later.

Pipelined backpropagation, three blocks, an update after every micro-batch (offsets in brackets):

    cycle         0    1    2       3       4          Offsets
    block 0       F    F    F       F       F B U      F 0 -> F 1 -> F 2
    block 1            F    F       F B U   F B U                     |
    block 2                 F B U   F B U   F B U      B 4 <- B 3 <- B 2

*Where something flows back*, a hop between blocks takes a cycle, on one rank too: delays count
blocks and not ranks, here 2(K-1-b) updates between `F` and `B` of block b out of K. Every update
then takes as many cycles as the largest one: a short one ends in ghosts, which are nothing but the
passing of a cycle. A lag of L updates allows its target to run L updates' cycles earlier.

*Where nothing flows back*, a hop between ranks takes a cycle and the actions of a block stay
together, so nothing is stale; no ghosts are needed.

With a period of two, a micro-batch enters every other cycle, and what is learnt in the block where
it turns back comes one cycle after its forward: one forward, one backward, in turns. The delays are
half as long, K-1-b updates, since an update comes every other cycle too.

    cycle         0    1    2    3      4    5      6
    block 0       F         F           F    B U    F        Offsets   F 0 -> F 1 -> F 2
    block 1            F         F      B U  F      B U                               |
    block 2                 F    B U    F    B U    F                  B 5 <- B 4 <- B 3

Drained once per update instead of once per segment, the cycles restart with each update and no
block is updated before all have learnt, which leaves nothing stale whatever flows back.

Source of the delays: Kosson et al. 2021, "Pipelined Backpropagation at Scale", section 2
(D = 2(S-1-s) updates).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, count, pairwise
from typing import Literal, NamedTuple

from dtrain.errors import ConfigError, DtrainError
from dtrain.schedules.actions import UNSPLIT_KINDS, Action, Point, Route
from dtrain.schedules.base import blocks_of_stage
from dtrain.schedules.messages import count_forward_passes
from dtrain.schedules.weight_policy import Delay

Offsets = Mapping[Point, int]
"""The first cycle of each point; of a `U`, counted from the last micro-batch of its update."""


def cyclic_order(
    stage: int,
    place: Sequence[int],
    micro_batches: Sequence[int],
    routes: Sequence[Route],
    drain: Literal["segment", "update"] = "segment",
    period: int = 1,
) -> Iterator[Action]:
    """Yield the actions of one rank; the arguments are those of `Schedule.plan`.

    Inside a cycle: `F` by pass and block, then `B`, then `U` by update and block.

    Parameters
    ----------
    drain : str
        Whether cycles go on to the segment's end, or restart with every update.
    period : int
        Cycles from one micro-batch to the next, where something flows back.

    Raises
    ------
    DtrainError
        Where routes form a circle: it names one of them and the least lag that would do.
    """
    rows, where = tuple(routes), tuple(place)
    if drain == "update":
        for update, size in enumerate(micro_batches):
            first = _offsets(rows, where, max(size, 1), math.inf)
            for action in _cyclic_actions(
                blocks_of_stage(stage, where), first, (size,), max(size, 1)
            ):
                yield action._replace(update=update)
        return
    width = max([*micro_batches, 1]) if feeds_back(rows) else None
    beat = period if width else 1
    first = _offsets(rows, where, width or 1, width or 1, beat)
    yield from _cyclic_actions(blocks_of_stage(stage, where), first, micro_batches, width, beat)


def block_delays(
    place: Sequence[int], routes: Sequence[Route], period: int = 1
) -> tuple[Delay, ...]:
    """Return how late each block learns when `cycles` run with this period.

    >>> from dtrain.schedules.action import Point, Route
    >>> there = [Route(Point(b, "F"), Point(b + 1, "F"), "x") for b in range(3)]
    >>> back = [Route(Point(b + 1, "B"), Point(b, "B"), "g") for b in range(3)]
    >>> [each.delay for each in lateness((0, 0, 1, 2), there + back)]
    [6, 4, 2, 0]
    >>> [each.delay for each in lateness((0, 0, 1, 2), there + back, period=2)]
    [3, 2, 1, 0]
    """
    beat = period if feeds_back(routes) else 1
    first = _offsets(tuple(routes), tuple(place), 1, 1, beat)
    found = []
    for block in range(len(place)):
        start, learn, end = (first[Point(block, kind)] for kind in UNSPLIT_KINDS)
        gap = max(0, first[Point(0, "B")] - learn) // beat
        found.append(Delay((end - start) // beat, gap))
    return tuple(found)


def feeds_back(routes: Sequence[Route]) -> bool:
    """Say whether anything flows to an earlier block, action or cycle, or to or from a `U`."""
    return any(_flows_back(route) for route in routes)


def _flows_back(route: Route) -> bool:
    source, target = route.source, route.target
    if route.lag or "U" in (source.kind, target.kind):  # even an update without samples takes time
        return True
    return target.block < source.block or _sort_key(target) <= _sort_key(source)


def _sort_key(point: Point) -> tuple[int, int, int]:
    """Return what points are sorted by inside a cycle."""
    return UNSPLIT_KINDS.index(point.kind), point.pass_, point.block


def _cyclic_actions(
    blocks: Sequence[int],
    offsets: Offsets,
    micro_batches: Sequence[int],
    width: int | None,
    period: int = 1,
) -> Iterator[Action]:
    """Yield the actions of blocks.

    `width` is how many micro-batches or ghosts an update has, None: its micro-batches.
    """
    clock = [(u, m) for u, size in enumerate(micro_batches) for m in range(width or size)]
    ends = list(accumulate(width or size for size in micro_batches))
    own = sorted((point for point in offsets if point.block in blocks), key=_sort_key)
    steps = [(*point, offsets[point]) for point in own if point.kind != "U"]
    closes = [(point.block, offsets[point]) for point in own if point.kind == "U"]
    yield from _due_updates([(block, 0) for block in blocks], ends)
    for cycle in range(period * len(clock) + max((offsets[point] for point in own), default=0)):
        for block, kind, pass_, late in steps:
            tick, between = divmod(cycle - late, period)
            if not between and 0 <= tick < len(clock):
                update, micro = clock[tick]
                if micro < micro_batches[update]:
                    yield Action(kind, block, update, micro, pass_)
        ticks = [(block, *divmod(cycle - late, period)) for block, late in closes]
        done = [(b, t + 1) for b, t, between in ticks if not between and 0 <= t < len(clock)]
        yield from _due_updates(done, ends)


def _due_updates(
    finished_cycles: Sequence[tuple[int, int]], update_ends: Sequence[int]
) -> Iterator[Action]:
    """Yield the updates that are due, given (block, cycles done), empty ones included.

    Update by update: replicas of other sizes meet here, so all must use the same order.
    """
    due = ((u, b) for b, ticks in finished_cycles for u in _completed_updates(update_ends, ticks))
    for update, block in sorted(due):
        yield Action("U", block, update)


def _completed_updates(update_ends: Sequence[int], ticks: int) -> range:
    """Return the updates that are complete after exactly `ticks` cycles."""
    return range(bisect_left(update_ends, ticks), bisect_right(update_ends, ticks))


class _Edge(NamedTuple):
    """`target` runs at least `weight` cycles after `source`; `route` is None inside a block."""

    source: Point
    target: Point
    weight: float
    route: Route | None


@lru_cache(maxsize=64)
def _offsets(
    routes: tuple[Route, ...],
    place: tuple[int, ...],
    width: int,
    update_length: float,
    period: int = 1,
) -> Offsets:
    """Return the offsets of all points.

    An update has `width` micro-batches and, ghosts included, lasts as long as `span` of them.
    """
    found = _longest_paths(_edges(routes, place, width, update_length, period))
    if isinstance(found, list):
        raise _circle_error(routes, place, (width, update_length, period), found)
    return found


def _edges(
    routes: Sequence[Route], place: Sequence[int], width: int, update_length: float, period: int
) -> list[_Edge]:
    """Return what must come after what: inside each block, and along the routes."""
    back, edges = feeds_back(routes), []
    for block in range(len(place)):
        chain = [Point(block, "F", p) for p in range(count_forward_passes(routes))]
        for source, target in pairwise([*chain, Point(block, "B"), Point(block, "U")]):
            turn = period - 1 if target.kind == "B" else 0
            edges.append(_Edge(source, target, turn, None))
            if not back and update_length < math.inf:  # the actions of a block stay together
                edges.append(_Edge(target, source, 0, None))
    if update_length == math.inf:  # no update before all have learnt
        hub = Point(-1, "U")
        edges += [_Edge(Point(block, "B"), hub, 0, None) for block in range(len(place))]
        edges += [_Edge(hub, Point(block, "U"), 0, None) for block in range(len(place))]
    for route in routes:
        source, target = route.source, route.target
        hop = source.block != target.block if back else place[source.block] != place[target.block]
        weight: float = hop + (width - 1) * period * ((source.kind == "U") - (target.kind == "U"))
        late = route.lag and route.lag * update_length * period
        edges.append(_Edge(source, target, weight - late, route))
    return edges


def _longest_paths(edges: Sequence[_Edge]) -> Offsets | list[_Edge]:
    """Return the longest paths from a common start, or a circle that takes more than no time."""
    leaving: dict[Point, list[_Edge]] = {}
    for edge in edges:
        leaving.setdefault(edge.source, []).append(edge)
        leaving.setdefault(edge.target, [])
    first, hops = dict.fromkeys(leaving, 0), dict.fromkeys(leaving, 0)
    last: dict[Point, _Edge] = {}
    todo = deque(leaving)
    while todo:
        source = todo.popleft()
        for edge in leaving[source]:
            target, arrival = edge.target, first[source] + edge.weight
            if arrival > first[target]:
                first[target], hops[target] = int(arrival), hops[source] + 1
                last[target] = edge
                todo.append(target)
                if hops[target] > len(leaving) and (circle := _find_circle(last, target)):
                    return circle
    return first


def _find_circle(last_edges: Mapping[Point, _Edge], point: Point) -> list[_Edge]:
    """Return the edges of the circle that leads to a point, empty where there is none."""
    for _ in last_edges:
        if point not in last_edges:
            return []
        point = last_edges[point].source
    path = [last_edges[point]]
    while path[-1].source != point:
        path.append(last_edges[path[-1].source])
    return path[::-1]


def _circle_error(
    routes: tuple[Route, ...],
    place: tuple[int, ...],
    lengths: tuple[int, float, int],
    circle: Sequence[_Edge],
) -> DtrainError:
    """Return the refusal of a circle: the route that flows back, and the least lag for it."""
    rows = [edge.route for edge in circle if edge.route is not None]
    culprit = next((row for row in rows if _flows_back(row)), rows[-1])
    others = [row for row in routes if row != culprit]
    for lag in count(culprit.lag + 1):
        found = _longest_paths(_edges([*others, culprit._replace(lag=lag)], place, *lengths))
        if not isinstance(found, list) or all(edge.route in (None, *others) for edge in found):
            break
    waits = ", ".join(f"{edge.target} for {edge.source}" for edge in circle)
    return ConfigError(
        "todo.key",
        f"the route {culprit} cannot be scheduled: it closes a circle in which each action waits "
        f"for another ({waits}); it needs lag = {lag} or more",
    )
