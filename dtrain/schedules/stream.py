"""Streaming: activations flow forward, every block learns at once, nothing flows back.

Invariant: a block's `F` and `B` of a micro-batch stand in the same cycle, so nothing is stale and
the result is that of training block after block on one rank.

Three stages, updates of two micro-batches (U has no width here), drained once per segment:

    cycle       0     1     2     3     4     5
    stage 0   F0 B0 F1 B1 U F0 B0 F1 B1 U
    stage 1         F0 B0 F1 B1 U F0 B0 F1 B1 U
    stage 2               F0 B0 F1 B1 U F0 B0 F1 B1 U

A rank sends what `F` yields before it learns (`B`) and updates (`U`): otherwise the fill would
take three times as long. An update needs no flush. Source: Belilovsky et al. 2020, "Decoupled
Greedy Learning of CNNs" (there with buffers and asynchronous; here in order and exact).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.schedules.action import Action, Route
from dtrain.schedules.cycles import cycles, feeds_back
from dtrain.schedules.schedule import Schedule


@final
@dataclass(frozen=True)
class Stream(Schedule):
    """Run each block in cycle (micro-batches so far) + (hops from the first rank)."""

    limit: ClassVar[str] = (
        "'stream' brings nothing back to an earlier block or into a forward; "
        'for gradients that flow back set schedule.name = "1f1b" or "fill-drain"'
    )

    def runs(self, route: Route) -> bool:
        kinds = route.source.kind + route.target.kind
        return kinds in ("FF", "FB", "BB") and not feeds_back([route])

    def plan(
        self, stage: int, place: Sequence[int], sizes: Sequence[int], routes: Sequence[Route]
    ) -> Iterator[Action]:
        self.admit(routes)
        return cycles(stage, place, sizes, routes)
