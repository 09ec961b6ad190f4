"""ZB-H1, a split backward: input gradients first, weight gradients fill the bubble.

    stage 0 |0123aAbBcCdD...    P - 1 - s forwards ahead, then F and I in turns; stage s starts its
    stage 1 |.012a.3b.A...      W after s pairs, so P micro-batches are live on every stage

Invariant: the backward has two halves, `I` and `W`, each in the order of the micro-batches.
Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.schedules import OneFOneB
from dtrain.schedules.actions import Kind
from dtrain.schedules.gpipe_1f1b import Flush


@final
@dataclass(frozen=True)
class Split(Flush):
    """1F1B with delayed weight gradients."""

    splits_backward: ClassVar[bool] = True

    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        return OneFOneB().warmup_forwards(stage, stages, micro_batches)

    def step_offsets(
        self, stage: int, stages: int, micro_batches: int
    ) -> tuple[tuple[Kind, int], ...]:
        ahead = self.warmup_forwards(stage, stages, micro_batches)
        return ("F", 0), ("I", ahead), ("W", ahead + stage)
