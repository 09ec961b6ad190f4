"""Pipelined: an update after every micro-batch, and the pipeline never drains inside a segment.

Invariant: the updates between `F` and `B` of a block follow from the routes and count blocks, not
ranks: 2(K-1-b) of K for backpropagation, K-b at most for an error that goes to all blocks at once.
`B` computes with the weights of its own moment, and with what its forward kept.

Backpropagation, three blocks:

    cycle         0    1    2       3       4
    block 0       F    F    F       F       F B U
    block 1            F    F       F B U   F B U
    block 2                 F B U   F B U   F B U

Source: Kosson et al. 2021, "Pipelined Backpropagation at Scale", without its compensations.
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
    """Cycles over whatever flows, drained at a segment's end alone."""

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
