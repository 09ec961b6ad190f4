"""`drained`: cycles over any routes that restart with every update, so nothing is stale.

Invariant: no block is updated before all blocks have run all backwards of the update, and
backwards run in the order of the micro-batches, whatever the routes are.

Two forward passes, the error of the first returning into the second (PEPITA), three blocks:

    cycle      0    1    2    3      4      5
    block 0    F              F/1 B
    block 1         F                F/1 B
    block 2              F                  F/1 B    then U0 U1 U2, and the next update starts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cyclic import cyclic_order


@dataclass(frozen=True)
class Drained(Schedule):
    """Run cycles that restart with every update."""

    unsupported_routes: ClassVar[str] = "'drained' runs every route"
    flushes: ClassVar[bool] = True

    def supports(self, route: Route) -> bool:
        return True

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        return cyclic_order(stage, place, micro_batches, routes, "update")
