"""Messages of one rank, derived from its own plan: nobody has to be asked.

Invariant: on every route the receipts of one end equal, in order, the sends of the other, because
both follow from plans that `check` proved to match.

    stage 0            route 0: activation F0 -> F1            stage 1
    offers(F0.m) = (0,)  ------------------------------>  takes(F1.m) = (0,)
    takes(B0.m)  = (1,)  <------------------------------  offers(B1.m) = (1,)
                       route 1: gradient B1 -> B0
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import final

from dtrain.schedules.action import Action, Point, Route


@final
class Messages:
    """What routes bring to a stage's actions and take from them; routes are named by index.

    Parameters
    ----------
    routes : sequence of Route
        All routes of the model; the index of a route is its name on both ends.
    place : sequence of int
        `place[b]` is the stage of block b.
    stage : int
        The stage of this rank.
    """

    def __init__(self, routes: Sequence[Route], place: Sequence[int], stage: int) -> None:
        self._sources = tuple(place[route.source.block] for route in routes)
        self._targets = tuple(place[route.target.block] for route in routes)
        self._takes = _table([route.target for route in routes], self._targets, stage)
        self._offers = _table([route.source for route in routes], self._sources, stage)

    def takes(self, action: Action) -> tuple[int, ...]:
        """Return the routes that bring something to an action, this rank's own included."""
        return self._takes.get((action.block, action.kind), ())

    def offers(self, action: Action) -> tuple[int, ...]:
        """Return the routes that take something from an action, to this rank itself included."""
        return self._offers.get((action.block, action.kind), ())

    def source(self, route: int) -> int:
        """Return the stage that a route comes from."""
        return self._sources[route]

    def target(self, route: int) -> int:
        """Return the stage that a route leads to."""
        return self._targets[route]

    def local(self, route: int) -> bool:
        """Say whether a route stays on one rank: a handover and no message."""
        return self._sources[route] == self._targets[route]

    def receipts(self, plan: Iterable[Action]) -> Iterator[tuple[int, Action]]:
        """Yield the messages that a plan receives from other ranks: (route, action), in order."""
        for action in plan:
            for route in self.takes(action):
                if not self.local(route):
                    yield route, action


def _table(
    points: Sequence[Point], stages: Sequence[int], stage: int
) -> dict[tuple[int, str], tuple[int, ...]]:
    """Return point -> indices of the routes that touch it, for the points of one stage."""
    table: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for route, (point, owner) in enumerate(zip(points, stages, strict=True)):
        if owner == stage:
            table[point].append(route)
    return {point: tuple(found) for point, found in table.items()}
