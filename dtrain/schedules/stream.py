"""`stream`: activations flow forward and every block runs its backward at once.

Invariant: `F` and `B` of a micro-batch are in the same cycle of a block, so nothing is stale and
the result is that of training block after block on one rank. A route back to an earlier block is
supported if its lag is at least one update plus one for each block that it passes: its messages
then arrive without a wait.

Three stages, updates of two micro-batches (U has no width here), one fill and drain per segment:

    cycle       0     1     2     3     4     5
    stage 0   F0 B0 F1 B1 U F0 B0 F1 B1 U
    stage 1         F0 B0 F1 B1 U F0 B0 F1 B1 U
    stage 2               F0 B0 F1 B1 U F0 B0 F1 B1 U

A rank sends the output of `F` before it runs `B` and `U`: otherwise the fill would take three
times as long. An update needs no flush. Source: Belilovsky et al. 2020, "Decoupled Greedy Learning
of CNNs" (asynchronous and with buffers; here in order and exact).
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
        "'stream' sends to an earlier block only with a lag of one update plus one for each block "
        'passed; for gradients that flow back set schedule.name = "1f1b" or "fill-drain", for '
        'anything else "drained", or "pipelined" if delayed gradients are acceptable'
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
