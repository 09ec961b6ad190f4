"""Whatever the routes are, update by update: the synchronous form of every order in cycles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dtrain.schedules.action import Action, Route
from dtrain.schedules.cycles import cycles
from dtrain.schedules.schedule import Schedule


@dataclass(frozen=True)
class Drained(Schedule):
    """Cycles that are drained once per update, so that nothing is stale."""

    limit: ClassVar[str] = "it runs everything"
    flushes: ClassVar[bool] = True

    def runs(self, route: Route) -> bool:
        return True

    def plan(
        self, stage: int, place: Sequence[int], sizes: Sequence[int], routes: Sequence[Route]
    ) -> Iterator[Action]:
        return cycles(stage, place, sizes, routes, "update")
