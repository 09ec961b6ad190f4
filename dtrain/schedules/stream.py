"""Streaming: activations flow forward, all blocks learn at once, nobody waits for what flows back.

Invariant: a block's `F` and `B` of a micro-batch stand in the same cycle, so nothing is stale and
the result is that of training block after block on one rank. What goes back to an earlier block
is served if it is late enough to be there without a wait: a lag of one update, and one for each
block that it passes.

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

from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cyclic import cyclic_order, feeds_back


@final
@dataclass(frozen=True)
class Stream(Schedule):
    """Run each block in cycle (micro-batches so far) + (hops from the first rank)."""

    unsupported_routes: ClassVar[str] = (
        "'stream' brings nothing back to an earlier block, unless it is as many updates late as "
        'it passes blocks, and one; for gradients that flow back set schedule.name = "1f1b" or '
        '"fill-drain", for anything else "drained", or "pipelined" where it may be stale'
    )

    def supports(self, route: Route) -> bool:
        source, target = route.source, route.target
        if feeds_back([route]):
            return route.lag > max(source.block - target.block, 0)
        return source.kind + target.kind in ("FF", "FB", "BB")

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        return cyclic_order(stage, place, micro_batches, routes)
