"""`pipelined`: pipelined backpropagation, with an update after every micro-batch and no flush.

Invariant: the number of updates between `F` and `B` of a block follows from the routes and counts
blocks, not ranks: 2(K-1-b) for block b of K under backpropagation, at most K-b for an error that
is sent to all blocks at once.

Backpropagation, three blocks:

    cycle         0    1    2       3       4
    block 0       F    F    F       F       F B U
    block 1            F    F       F B U   F B U
    block 2                 F B U   F B U   F B U

Source: Kosson et al. 2021, "Pipelined Backpropagation at Scale", arXiv 2003.11666.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.schedules.actions import Route
from dtrain.schedules.asynchronous import AsyncSchedule


@final
@dataclass(frozen=True)
class Pipelined(AsyncSchedule):
    """Run one forward and one backward of every block per cycle, over any routes."""

    name: ClassVar[str] = "pipelined"
    unsupported_routes: ClassVar[str] = "'pipelined' runs every route"

    def supports(self, route: Route) -> bool:
        return True
