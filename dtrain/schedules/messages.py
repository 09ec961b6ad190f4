"""The messages of one rank, derived from its own plan without asking any other rank.

Invariant: on every route the receiver's order equals the sender's order, because both follow from
plans that `verify_schedule` proved to match and from the micro-batch counts that both ends know.

    stage 0               route 0: activation F0 -> F1               stage 1
    outgoing(F0.m) = (0,)  ------------------------------>  incoming(F1.m) = (0,)
    incoming(B0.m) = (1,)  <------------------------------  outgoing(B1.m) = (1,)
                          route 1: gradient B1 -> B0

A route with a lag, or with one message per update, has no message if either end does not exist:

    micro-batches 2 2 1    source   0.0   0.1   1.0   1.1   2.0      update.micro-batch
    lag 1                  target   1.0   1.1   2.0    -     -       no 2.1, no update 3: not sent
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import final

from dtrain.partition import is_ascending
from dtrain.schedules.actions import INPUT_GRADIENT_KINDS, Action, Kind, Point, Route

_PointKey = tuple[int, Kind, int]
"""Block, kind and pass."""


def count_forward_passes(routes: Iterable[Route]) -> int:
    """Return the number of forwards of each micro-batch that an objective's routes imply."""
    points = (point for route in routes for point in (route.source, route.target))
    return 1 + max((point.pass_ for point in points if point.kind == "F"), default=0)


@final
class MessageTable:
    """The routes that enter and leave the actions of a stage; a route is its index in `routes`.

    Parameters
    ----------
    routes : sequence of Route
        All routes of the model; both ends identify a route by its index.
    place : sequence of int
        `place[b]` is the stage of block b.
    stage : int
        Stage of this rank.
    micro_batches : sequence of int
        Number of micro-batches of each update of the segment, in this replica.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        place: Sequence[int],
        stage: int,
        micro_batches: Sequence[int],
    ) -> None:
        self._routes = tuple(routes)
        self._micro_batches = tuple(micro_batches)
        self._source_stages = tuple(place[route.source.block] for route in routes)
        self._target_stages = tuple(place[route.target.block] for route in routes)
        self._incoming = _routes_by_point(
            [route.target for route in routes], self._target_stages, stage
        )
        self._outgoing = _routes_by_point(
            [route.source for route in routes], self._source_stages, stage
        )
        self._always_sent = not any(
            route.lag or route.once_per_update or route.every > 1 for route in routes
        )
        largest = max(self._micro_batches, default=0)
        loops = not is_ascending(place)
        self._windows = tuple(
            r.window
            or r.blocks_passed
            + (1 if r.blocks_passed and loops else 0)
            + 1
            + -(-r.lag // r.every) * (1 if r.once_per_update else largest)
            for r in routes
        )

    def incoming(self, action: Action) -> tuple[int, ...]:
        """Return the routes that enter an action, those from the same rank included."""
        routes = self._incoming.get((action.block, action.kind, action.pass_), ())
        if self._always_sent:
            return routes
        return tuple(route for route in routes if self._has_source(route, action))

    def outgoing(self, action: Action) -> tuple[int, ...]:
        """Return the routes that leave an action, those to the same rank included."""
        routes = self._outgoing.get((action.block, action.kind, action.pass_), ())
        if self._always_sent:
            return routes
        return tuple(route for route in routes if self._has_target(route, action))

    def source_micro_batch(self, route: int, action: Action) -> tuple[int, int]:
        """Return update and micro-batch (-1 for a `U`) of the message that enters an action."""
        if self._always_sent:
            return action.update, action.micro
        row = self._routes[route]
        micro = -1 if row.source.kind == "U" else 0 if row.once_per_update else action.micro
        return action.update - row.lag, micro

    def source_stage(self, route: int) -> int:
        return self._source_stages[route]

    def target_stage(self, route: int) -> int:
        return self._target_stages[route]

    def is_local(self, route: int) -> bool:
        """Return whether both ends of a route are on one rank, so that no message is sent."""
        return self._source_stages[route] == self._target_stages[route]

    def window(self, route: int) -> int:
        """Return how many receives of a route are posted at a time.

        One without a lag. A message that is sent `lag` updates early must not block its sender, so
        as many more are posted as `lag` updates of the largest size have messages. A skip passes
        blocks, each of which may hold an earlier micro-batch; where places do not ascend, one more
        is posted, since both ends of two skips may wait for each other in one cycle. A route may
        state another window.
        """
        return self._windows[route]

    def remote_receives(self, plan: Iterable[Action]) -> Iterator[tuple[int, Action]]:
        """Yield (route, action) of the messages that a plan receives from other ranks, in order."""
        for action in plan:
            for route in self.incoming(action):
                if not self.is_local(route):
                    yield route, action

    def _has_source(self, route: int, action: Action) -> bool:
        """Return whether the action exists from which a route would enter `action`."""
        row = self._routes[route]
        is_first = action.micro <= 0 or not row.once_per_update
        update, micro = self.source_micro_batch(route, action)
        return is_first and update % row.every == 0 and self._exists(update, micro)

    def _has_target(self, route: int, action: Action) -> bool:
        """Return whether the action exists to which a route would leave `action`."""
        row = self._routes[route]
        micro = -1 if row.target.kind == "U" else 0 if row.once_per_update else action.micro
        is_first = action.micro <= 0 or not row.once_per_update
        is_sent = is_first and action.update % row.every == 0
        return is_sent and self._exists(action.update + row.lag, micro)

    def _exists(self, update: int, micro: int) -> bool:
        """Return whether the segment has a micro-batch; -1, a `U`, exists in empty updates too."""
        return 0 <= update < len(self._micro_batches) and micro < self._micro_batches[update]


def _routes_by_point(
    points: Sequence[Point], stages: Sequence[int], stage: int
) -> dict[_PointKey, tuple[int, ...]]:
    """Return the indices of the routes at each point of a stage; `points[i]` is one end of route i.

    In a split plan the `I` of a block has the routes of its `B`.
    """
    table: defaultdict[_PointKey, list[int]] = defaultdict(list)
    for route, (point, point_stage) in enumerate(zip(points, stages, strict=True)):
        if point_stage == stage:
            for kind in INPUT_GRADIENT_KINDS if point.kind == "B" else (point.kind,):
                table[point.block, kind, point.pass_].append(route)
    return {key: tuple(routes) for key, routes in table.items()}
