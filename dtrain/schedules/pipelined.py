"""Pipelined: an update after every micro-batch, and the pipeline never drains inside a segment.

Invariant: the updates between `F` and `B` of a block follow from the routes and count blocks, not
ranks: 2(K-1-b) of K for backpropagation, K-b at most for an error that goes to all blocks at once.

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
    """One forward and one backward of every block per cycle, over whatever flows."""

    name: ClassVar[str] = "pipelined"
    unsupported_routes: ClassVar[str] = "'pipelined' runs every route"

    def supports(self, route: Route) -> bool:
        return True
