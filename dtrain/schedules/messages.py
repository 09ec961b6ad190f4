"""Messages of one rank, derived from its own plan: nobody has to be asked.

Invariant: on every route the receipts of one end equal, in order, the sends of the other, because
both follow from plans that `check` proved to match, and from the sizes that both know.

    stage 0            route 0: activation F0 -> F1            stage 1
    offers(F0.m) = (0,)  ------------------------------>  takes(F1.m) = (0,)
    takes(B0.m)  = (1,)  <------------------------------  offers(B1.m) = (1,)
                       route 1: gradient B1 -> B0

A route with a lag, or with one message per update, has no message where either end does not exist:

    sizes 2 2 1, lag 1     source   0.0   0.1   1.0   1.1   2.0      update.micro-batch
                           target   1.0   1.1   2.0    -     -       no 2.1, no update 3: not sent
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import final

from dtrain.schedules.actions import INPUT_GRADIENT_KINDS, Action, Point, Route

_PointKey = tuple[int, str, int]
"""Block, kind and pass."""


def count_forward_passes(routes: Iterable[Route]) -> int:
    """Return how many forwards each micro-batch has: the objective's routes say so."""
    points = (point for route in routes for point in (route.source, route.target))
    return 1 + max((point.pass_ for point in points if point.kind == "F"), default=0)


@final
class MessageTable:
    """What routes bring to a stage's actions and take from them; routes are named by index.

    Parameters
    ----------
    routes : sequence of Route
        All routes of the model; the index of a route is its name on both ends.
    place : sequence of int
        `place[b]` is the stage of block b.
    stage : int
        The stage of this rank.
    sizes : sequence of int
        Micro-batches of each update of the segment, of this replica.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        place: Sequence[int],
        stage: int,
        micro_batches: Sequence[int],
    ) -> None:
        self._routes, self._micro_batches = tuple(routes), tuple(micro_batches)
        self._source_stages = tuple(place[route.source.block] for route in routes)
        self._target_stages = tuple(place[route.target.block] for route in routes)
        self._incoming = _routes_by_point(
            [route.target for route in routes], self._target_stages, stage
        )
        self._outgoing = _routes_by_point(
            [route.source for route in routes], self._source_stages, stage
        )
        self._always_sent = not any(route.lag or route.once_per_update for route in routes)
        most = max(self._micro_batches, default=0)
        self._windows = tuple(1 + r.lag * (1 if r.once_per_update else most) for r in routes)

    def incoming(self, action: Action) -> tuple[int, ...]:
        """Return the routes that bring something to an action, this rank's own included."""
        found = self._incoming.get((action.block, action.kind, action.pass_), ())
        return (
            found if self._always_sent else tuple(r for r in found if self._has_source(r, action))
        )

    def outgoing(self, action: Action) -> tuple[int, ...]:
        """Return the routes that take something from an action, to this rank itself included."""
        found = self._outgoing.get((action.block, action.kind, action.pass_), ())
        return (
            found if self._always_sent else tuple(r for r in found if self._has_target(r, action))
        )

    def source_micro_batch(self, route: int, action: Action) -> tuple[int, int]:
        """Return update and micro-batch (-1: a `U`) of the source whose message an action takes."""
        if self._always_sent:
            return action.update, action.micro
        row = self._routes[route]
        micro = -1 if row.source.kind == "U" else 0 if row.once_per_update else action.micro
        return action.update - row.lag, micro

    def source_stage(self, route: int) -> int:
        """Return the stage that a route comes from."""
        return self._source_stages[route]

    def target_stage(self, route: int) -> int:
        """Return the stage that a route leads to."""
        return self._target_stages[route]

    def is_local(self, route: int) -> bool:
        """Say whether a route stays on one rank: a handover and no message."""
        return self._source_stages[route] == self._target_stages[route]

    def window(self, route: int) -> int:
        """Return how many receives of a route are posted at a time: the next one, and a lag's.

        What is sent ahead of its update must not wait for it: with a lag of one update, as many
        as the largest update has messages, so the sender waits for no more than without a lag.
        """
        return self._windows[route]

    def remote_receives(self, plan: Iterable[Action]) -> Iterator[tuple[int, Action]]:
        """Yield the messages that a plan receives from other ranks: (route, action), in order."""
        for action in plan:
            for route in self.incoming(action):
                if not self.is_local(route):
                    yield route, action

    def _has_source(self, route: int, action: Action) -> bool:
        """Say whether the source of what a route would bring to an action exists."""
        first = action.micro <= 0 or not self._routes[route].once_per_update
        return first and self._exists(*self.source_micro_batch(route, action))

    def _has_target(self, route: int, action: Action) -> bool:
        """Say whether the target of what a route would take from an action exists."""
        row = self._routes[route]
        micro = -1 if row.target.kind == "U" else 0 if row.once_per_update else action.micro
        first = action.micro <= 0 or not row.once_per_update
        return first and self._exists(action.update + row.lag, micro)

    def _exists(self, update: int, micro: int) -> bool:
        """Say whether a micro-batch is in the segment; the `U` (-1) of an empty update is."""
        return 0 <= update < len(self._micro_batches) and micro < self._micro_batches[update]


def _routes_by_point(
    points: Sequence[Point], stages: Sequence[int], stage: int
) -> dict[_PointKey, tuple[int, ...]]:
    """Return point -> indices of the routes that touch it, for the points of one stage.

    In a split plan the `I` of a block has the routes of its `B`.
    """
    table: defaultdict[_PointKey, list[int]] = defaultdict(list)
    for route, (point, owner) in enumerate(zip(points, stages, strict=True)):
        if owner == stage:
            for kind in INPUT_GRADIENT_KINDS if point.kind == "B" else (point.kind,):
                table[point.block, kind, point.pass_].append(route)
    return {point: tuple(found) for point, found in table.items()}
