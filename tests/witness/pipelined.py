"""Pipelined backpropagation: an update after every micro-batch, and the pipeline never drains.

Invariant: 2(K-1-b) updates between `F` and `B` of block b out of K, on any number of ranks; `B`
computes with the weights of its own moment.
Source: Kosson et al. 2021, "Pipelined Backpropagation at Scale".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from dtrain.errors import Refusal
from dtrain.schedules.action import Action, Route
from dtrain.schedules.cycles import cycles
from dtrain.schedules.schedule import Schedule


@final
@dataclass(frozen=True)
class Pipelined(Schedule):
    """Cycles over whatever flows, drained at the end of a segment."""

    limit: ClassVar[str] = "'pipelined' runs every route"
    weights: ClassVar[Literal["own", "current"]] = "current"

    def runs(self, route: Route) -> bool:
        return True

    def plan(
        self, stage: int, place: Sequence[int], sizes: Sequence[int], routes: Sequence[Route]
    ) -> Iterator[Action]:
        if max(sizes, default=0) > 1:
            raise Refusal(
                f"'pipelined' updates after every micro-batch, but an update has {max(sizes)}: set "
                f"micro-batches = 1, and batch-size to 1/{max(sizes)} of it for the same step"
            )
        return cycles(stage, place, sizes, routes)
