"""A V-shaped placement: blocks go down the ranks and back, so the first rank holds the loss too.

    blocks 0 1 2 3 4 5 6 7
    place  0 1 2 3 3 2 1 0        the route from block 3 to 4 is local

Invariant: cycles that drain with every update, so nothing is stale, on any placement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain import partition
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cyclic import cyclic_order


@final
@dataclass(frozen=True)
class Fold(Schedule):
    """Synchronous cycles on a V."""

    unsupported_routes: ClassVar[str] = "'fold' runs no route from or to an update"
    flushes: ClassVar[bool] = True

    def supports(self, route: Route) -> bool:
        return "U" not in (route.source.kind, route.target.kind)

    def assign_stages(
        self, costs: Sequence[float], stages: int, transfers: Sequence[float] = ()
    ) -> tuple[int, ...]:
        partition.assign_stages(costs, stages, transfers)  # refuses too many stages
        parts = partition.assign_stages(costs, min(len(costs), 2 * stages), transfers)
        return tuple(part if part < stages else 2 * stages - 1 - part for part in parts)

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        return cyclic_order(stage, place, micro_batches, routes, drain="update")
