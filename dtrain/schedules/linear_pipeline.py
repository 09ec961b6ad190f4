"""The routes of backpropagation: forward through all blocks, and back again, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dtrain.errors import ConfigError
from dtrain.schedules.actions import Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cyclic import feeds_back


@dataclass(frozen=True)
class LinearPipeline(Schedule):
    """A schedule for routes that go forward through all blocks and back again."""

    unsupported_routes: ClassVar[str] = (
        "it sends activations to later blocks and gradients to earlier blocks, in one forward "
        'pass; for anything else set schedule.name = "pipelined"'
    )

    def supports(self, route: Route) -> bool:
        source, target = route.source, route.target
        if route.lag or source.pass_ or target.pass_ or source.kind != target.kind:
            return False
        forward, back = source.block < target.block, source.block > target.block
        return forward if source.kind == "F" else source.kind == "B" and back

    def supports_all(self, routes: Sequence[Route]) -> bool:
        return super().supports_all(routes) and (feeds_back(routes) or not routes)

    def check_routes(self, routes: Sequence[Route]) -> None:
        super().check_routes(routes)
        if not self.supports_all(routes):
            raise ConfigError(
                "schedule.no-backward-routes",
                "no route leads back to an earlier block, so late updates would gain nothing: "
                'set schedule.name = "stream", which has no stale weights',
            )
