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

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, final

from dtrain.schedules.action import Action, Route
from dtrain.schedules.schedule import Schedule, owned


@final
@dataclass(frozen=True)
class Stream(Schedule):
    """Run each block in cycle (micro-batches so far) + (hops from the first rank)."""

    limit: ClassVar[str] = (
        "'stream' brings nothing back to an earlier block or into a forward; "
        'for gradients that flow back set schedule.name = "1f1b" or "fill-drain"'
    )

    def runs(self, route: Route) -> bool:
        source, target = route.source, route.target
        if source.kind == target.kind:
            return source.block < target.block
        return (source.kind, target.kind) == ("F", "B") and source.block <= target.block

    def plan(
        self, stage: int, place: Sequence[int], sizes: Sequence[int], routes: Sequence[Route]
    ) -> Iterator[Action]:
        self.admit(routes)
        blocks, offset = owned(stage, place), _offsets(place, routes)
        clock = [(update, micro) for update, size in enumerate(sizes) for micro in range(size)]
        ends = list(accumulate(sizes))
        yield from _updates([(block, 0) for block in blocks], ends)
        for cycle in range(len(clock) + max((offset[b] for b in blocks), default=0)):
            live = [(b, cycle - offset[b]) for b in blocks if 0 <= cycle - offset[b] < len(clock)]
            for kind in "FB":
                for block, count in live:
                    yield Action(kind, block, *clock[count])
            yield from _updates([(block, count + 1) for block, count in live], ends)


def _offsets(place: Sequence[int], routes: Sequence[Route]) -> list[int]:
    """Return the first cycle of each block: the longest path over the routes, hops count 1.

    Counted per block and not per action: `F` and `B` of a block stay together.
    """
    offset = [0] * len(place)
    for route in sorted(routes, key=lambda r: r.target.block):
        source, target = route.source.block, route.target.block
        hop = place[source] != place[target]
        offset[target] = max(offset[target], offset[source] + hop)
    return offset


def _updates(done: Sequence[tuple[int, int]], ends: Sequence[int]) -> Iterator[Action]:
    """Yield the updates that are due, given (block, micro-batches done), empty ones included.

    Update by update: replicas of other sizes meet here, so all must use the same order.
    """
    due = ((u, b) for b, count in done for u in _ending(ends, count))
    for update, block in sorted(due):
        yield Action("U", block, update)


def _ending(ends: Sequence[int], count: int) -> range:
    """Return the updates that are complete after exactly `count` micro-batches."""
    return range(bisect_left(ends, count), bisect_right(ends, count))
