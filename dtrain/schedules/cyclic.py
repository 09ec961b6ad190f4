"""Cyclic orders: the order follows from the routes alone, whatever flows forward or back.

Invariant: an action runs in cycle (micro-batches so far) + (offset of its point), and the offsets
are the longest paths over the routes. So each block runs the same actions in the same order on any
number of ranks, and no action waits for a message of a later cycle.

Pipelined backpropagation, three blocks, an update after every micro-batch:

    cycle         0    1    2       3       4          Offsets
    block 0       F    F    F       F       F B U      F 0 -> F 1 -> F 2
    block 1            F    F       F B U   F B U                     |
    block 2                 F B U   F B U   F B U      B 4 <- B 3 <- B 2

*If a route flows back*, a hop between blocks takes a cycle, on one rank too: delays count blocks
and not ranks, here 2(K-1-b) updates between `F` and `B` of block b out of K. Every update then
takes as many cycles as the largest one: a smaller update is padded with empty cycles. A lag of L
updates allows its target to run L updates' cycles earlier.

*If no route flows back*, a hop between ranks takes a cycle and the actions of a block stay
together, so nothing is stale; padding is needed only where the places do not ascend.

With a period of two, a micro-batch enters every other cycle, and the last block runs its backward
one cycle after its forward: one forward, one backward, in turns. The delays are half as long,
K-1-b updates, since there is an update in every other cycle too.

    cycle         0    1    2    3      4    5      6
    block 0       F         F           F    B U    F        Offsets   F 0 -> F 1 -> F 2
    block 1            F         F      B U  F      B U                               |
    block 2                 F    B U    F    B U    F                  B 5 <- B 4 <- B 3

Drained once per update instead of once per segment, the cycles restart with each update and no
block is updated before all backwards have run, so nothing is stale whatever flows back.

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

from dtrain.errors import ConfigError
from dtrain.partition import is_ascending
from dtrain.schedules.actions import UNSPLIT_KINDS, Action, Point, Route
from dtrain.schedules.base import blocks_of_stage
from dtrain.schedules.messages import count_forward_passes
from dtrain.schedules.update_lags import UpdateCycles
from dtrain.schedules.weight_policy import Delay

Offsets = Mapping[Point, int]
"""First cycle of each point; for a `U`, counted from the last micro-batch of its update."""


def cyclic_order(
    stage: int,
    place: Sequence[int],
    micro_batches: Sequence[int],
    routes: Sequence[Route],
    drain: Literal["segment", "update"] = "segment",
    period: int = 1,
) -> Iterator[Action]:
    """Yield the actions of one rank.

    Inside a cycle: `F` by pass and block, then `B`, then `U` by update and block.

    Parameters
    ----------
    stage, place, micro_batches, routes
        As for `Schedule.plan`.
    drain : "segment" or "update"
        Where the pipeline drains: at the end of the segment, or of every update.
    period : int
        Cycles from one micro-batch to the next, if a route flows back.

    Raises
    ------
    ConfigError
        Routes form a circle; the message names one of them and the least lag that opens it.
    """
    routes, place = tuple(routes), tuple(place)
    blocks = blocks_of_stage(stage, place)
    if drain == "update":
        for update, count in enumerate(micro_batches):
            width = max(count, 1)
            offsets = _offsets(routes, place, width, math.inf)
            for action in _cyclic_actions(blocks, offsets, (count,), width):
                yield action._replace(update=update)
    elif feeds_back(routes):
        width = max([*micro_batches, 1])
        offsets = _offsets(routes, place, width, width, period)
        yield from _cyclic_actions(blocks, offsets, micro_batches, width, period)
    else:
        offsets = _offsets(routes, place, 1, 1)
        # Blocks of one stage with other offsets: padded, so that all replicas update them in the
        # same order, however many micro-batches each has.
        slots = None if is_ascending(place) else max([*micro_batches, 1])
        yield from _cyclic_actions(blocks, offsets, micro_batches, slots)


def block_delays(
    place: Sequence[int], routes: Sequence[Route], period: int = 1
) -> tuple[Delay, ...]:
    """Return the delay of each block in a cyclic order of this period.

    >>> from dtrain.schedules.actions import Point, Route
    >>> forward = [Route(Point(b, "F"), Point(b + 1, "F"), "x") for b in range(3)]
    >>> backward = [Route(Point(b + 1, "B"), Point(b, "B"), "g") for b in range(3)]
    >>> [delay.updates for delay in block_delays((0, 0, 1, 2), forward + backward)]
    [6, 4, 2, 0]
    >>> [delay.updates for delay in block_delays((0, 0, 1, 2), forward + backward, period=2)]
    [3, 2, 1, 0]
    """
    if not feeds_back(routes):
        period = 1
    offsets = _offsets(tuple(routes), tuple(place), 1, 1, period)
    first_backward = offsets[Point(0, "B")]
    delays = []
    for block in range(len(place)):
        forward, backward, update = (offsets[Point(block, kind)] for kind in UNSPLIT_KINDS)
        gap = max(0, first_backward - backward) // period
        delays.append(Delay((update - forward) // period, gap))
    return tuple(delays)


def update_cycles(
    blocks: int, routes: Sequence[Route], period: int = 1, width: int = 1
) -> UpdateCycles | None:
    """Return the cycles of the updates of all blocks, on any placement; None if no route flows
    back: the cycles then depend on the placement.

    Parameters
    ----------
    period : int
        As for `cyclic_order`.
    width : int
        Micro-batches of an update.

    >>> from dtrain.schedules.actions import Point, Route
    >>> forward = [Route(Point(b, "F"), Point(b + 1, "F"), "x") for b in range(2)]
    >>> backward = [Route(Point(b + 1, "B"), Point(b, "B"), "g") for b in range(2)]
    >>> update_cycles(3, forward + backward)
    UpdateCycles(offsets=(4, 3, 2), length=1)
    """
    if not feeds_back(routes):
        return None
    offsets = _offsets(tuple(routes), tuple(range(blocks)), width, width, period)
    return UpdateCycles(tuple(offsets[Point(b, "U")] for b in range(blocks)), period * width)


def feeds_back(routes: Sequence[Route]) -> bool:
    """Return whether a route leads to an earlier block or action, has a lag, or touches a `U`."""
    return any(_flows_back(route) for route in routes)


def _flows_back(route: Route) -> bool:
    source, target = route.source, route.target
    if route.lag or "U" in (source.kind, target.kind):  # an update without samples has its cycle
        return True
    return target.block < source.block or _sort_key(target) <= _sort_key(source)


def _sort_key(point: Point) -> tuple[int, int, int]:
    """Return the sort key of the points in a cycle."""
    return UNSPLIT_KINDS.index(point.kind), point.pass_, point.block


def _cyclic_actions(
    blocks: Sequence[int],
    offsets: Offsets,
    micro_batches: Sequence[int],
    width: int | None,
    period: int = 1,
) -> Iterator[Action]:
    """Yield the actions of blocks.

    Parameters
    ----------
    width : int or None
        Slots for micro-batches that every update has, empty ones included; None: one for each
        of its micro-batches.
    """
    slots = [
        (update, micro)
        for update, count in enumerate(micro_batches)
        for micro in range(width or count)
    ]
    update_ends = list(accumulate(width or count for count in micro_batches))
    points = sorted((point for point in offsets if point.block in blocks), key=_sort_key)
    steps = [(*point, offsets[point]) for point in points if point.kind != "U"]
    updates = [(point.block, offsets[point]) for point in points if point.kind == "U"]
    yield from _due_updates([(block, 0) for block in blocks], update_ends)
    last_offset = max((offsets[point] for point in points), default=0)
    for cycle in range(period * len(slots) + last_offset):
        for block, kind, pass_, offset in steps:
            slot, phase = divmod(cycle - offset, period)
            if not phase and 0 <= slot < len(slots):
                update, micro = slots[slot]
                if micro < micro_batches[update]:
                    yield Action(kind, block, update, micro, pass_)
        finished = []
        for block, offset in updates:
            slot, phase = divmod(cycle - offset, period)
            if not phase and 0 <= slot < len(slots):
                finished.append((block, slot + 1))
        yield from _due_updates(finished, update_ends)


def _due_updates(
    finished_slots: Sequence[tuple[int, int]], update_ends: Sequence[int]
) -> Iterator[Action]:
    """Yield the updates that follow a finished slot (block, slots done), empty updates included.

    They are sorted by update: replicas with other micro-batch counts synchronise here, so all must
    use the same order.
    """
    updates = (
        (update, block)
        for block, slots in finished_slots
        for update in _completed_updates(update_ends, slots)
    )
    for update, block in sorted(updates):
        yield Action("U", block, update)


def _completed_updates(update_ends: Sequence[int], slots: int) -> range:
    """Return the updates that are complete after exactly `slots` slots."""
    return range(bisect_left(update_ends, slots), bisect_right(update_ends, slots))


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

    Parameters
    ----------
    width : int
        Slots of an update, empty ones included.
    update_length : float
        Slots from one update to the next: `width`, or infinite where the pipeline drains with
        every update.

    Raises
    ------
    ConfigError
        Routes form a circle.
    """
    offsets = _longest_paths(_edges(routes, place, width, update_length, period))
    if isinstance(offsets, list):
        raise _circle_error(routes, place, (width, update_length, period), offsets)
    return offsets


def _edges(
    routes: Sequence[Route], place: Sequence[int], width: int, update_length: float, period: int
) -> list[_Edge]:
    """Return the order that must hold inside each block and along the routes."""
    has_feedback = feeds_back(routes)
    # A hop between blocks takes a cycle with feedback, otherwise only a hop between ranks.
    hop_units = range(len(place)) if has_feedback else place
    edges = []
    for block in range(len(place)):
        chain = [Point(block, "F", p) for p in range(count_forward_passes(routes))]
        for source, target in pairwise([*chain, Point(block, "B"), Point(block, "U")]):
            weight = period - 1 if target.kind == "B" else 0
            edges.append(_Edge(source, target, weight, None))
            if (
                not has_feedback and update_length < math.inf
            ):  # the actions of a block stay together
                edges.append(_Edge(target, source, 0, None))
    if update_length == math.inf:  # no update before all backwards have run
        barrier = Point(-1, "U")
        edges += [_Edge(Point(block, "B"), barrier, 0, None) for block in range(len(place))]
        edges += [_Edge(barrier, Point(block, "U"), 0, None) for block in range(len(place))]
    for route in routes:
        source, target = route.source, route.target
        hop = hop_units[source.block] != hop_units[target.block]
        # The offset of a U counts from the last slot of its update, all others from the first.
        shift = (width - 1) * period * ((source.kind == "U") - (target.kind == "U"))
        lag = route.lag and route.lag * update_length * period
        edges.append(_Edge(source, target, hop + shift - lag, route))
    return edges


def _longest_paths(edges: Sequence[_Edge]) -> Offsets | list[_Edge]:
    """Return the longest paths from a common start, or a circle of positive length."""
    leaving: dict[Point, list[_Edge]] = {}
    for edge in edges:
        leaving.setdefault(edge.source, []).append(edge)
        leaving.setdefault(edge.target, [])
    offsets, hops = dict.fromkeys(leaving, 0), dict.fromkeys(leaving, 0)
    last_edges: dict[Point, _Edge] = {}
    queue = deque(leaving)
    while queue:
        source = queue.popleft()
        for edge in leaving[source]:
            target, offset = edge.target, offsets[source] + edge.weight
            if offset > offsets[target]:
                offsets[target], hops[target] = int(offset), hops[source] + 1
                last_edges[target] = edge
                queue.append(target)
                if hops[target] > len(leaving) and (circle := _find_circle(last_edges, target)):
                    return circle
    return offsets


def _find_circle(last_edges: Mapping[Point, _Edge], point: Point) -> list[_Edge]:
    """Return the edges of the circle that leads to a point; empty: there is none."""
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
) -> ConfigError:
    """Return the error for a circle; it names the route that flows back and its least lag."""
    in_circle = [edge.route for edge in circle if edge.route is not None]
    feedback = next((route for route in in_circle if _flows_back(route)), in_circle[-1])
    others = [route for route in routes if route != feedback]
    for lag in count(feedback.lag + 1):
        offsets = _longest_paths(_edges([*others, feedback._replace(lag=lag)], place, *lengths))
        if not isinstance(offsets, list) or all(edge.route in (None, *others) for edge in offsets):
            break
    waits = ", ".join(f"{edge.target} for {edge.source}" for edge in circle)
    return ConfigError(
        "schedule.routes-form-circle",
        f"the route {feedback} cannot be scheduled: it closes a circle in which each action waits "
        f"for another ({waits}); it needs lag = {lag} or more",
    )
