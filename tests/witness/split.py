"""A split backward, ZB-H1: gradients of the inputs first, those of the weights fill the bubble.

    stage 0 |0123aAbBcCdD...    P - 1 - s forwards ahead, then F and I in turns; rank s starts its
    stage 1 |.012a.3b.A...      W after s pairs, so P micro-batches are live on every rank

Invariant: one backward in two halves, `I` and `W`, both in order of the micro-batches.
Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.schedules import OneFOneB
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule, blocks_of_stage


@final
@dataclass(frozen=True)
class Split(Schedule):
    """1F1B whose weight gradients come later."""

    unsupported_routes: ClassVar[str] = "'split' brings activations forward and gradients back"
    flushes: ClassVar[bool] = True
    splits_backward: ClassVar[bool] = True

    def supports(self, route: Route) -> bool:
        return OneFOneB().supports(route)

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        blocks, stages = blocks_of_stage(stage, place), max(place) + 1
        for update, micros in enumerate(micro_batches):
            ahead = min(micros, stages - 1 - stage)
            for step in range(micros + ahead + stage):
                for kind, late in (("F", 0), ("I", ahead), ("W", ahead + stage)):
                    if 0 <= step - late < micros:
                        way = blocks if kind == "F" else blocks[::-1]
                        yield from (Action(kind, b, update, step - late) for b in way)
            yield from (Action("U", b, update) for b in blocks)
