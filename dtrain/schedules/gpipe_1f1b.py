"""Flush schedules of backpropagation: the pipeline drains at the end of every update.

Invariant: both learn in order 0 .. M-1 and update once after the last `B`; they differ only in how
many forwards a stage runs ahead, so they train the same model and only memory differs.

Three stages, four micro-batches, as `draw` shows them (digits F, letters B, U the update):

    fill-drain                      1f1b
    stage 0 |0123......aabbccdU|    stage 0 |012....aa3bb.cc.dU|
    stage 1 |.0123...aabbccdU..|    stage 1 |.01..aa2bb3cc.dU..|
    stage 2 |..0123aabbccdU....|    stage 2 |..0aa1bb2cc3dU....|
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule, blocks_of_stage


class Flush(Schedule):
    """Run `ahead` forwards, then forward and backward in turns, then the remaining backwards."""

    unsupported_routes: ClassVar[str] = (
        "flush schedules bring activations to later blocks and gradients to earlier ones, in one "
        "pass; an error for all blocks leaves the last block's B, not its F; "
        'for anything else that flows to later blocks set schedule.name = "stream"'
    )

    flushes: ClassVar[bool] = True

    @abstractmethod
    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        """Return the forwards that a stage runs before its first backward, at most `micros`."""

    def supports(self, route: Route) -> bool:
        source, target = route.source, route.target
        if source.pass_ or target.pass_:
            return False
        if route.lag:  # every rank ends an update before the next
            return True
        if source.kind == target.kind == "F":
            return source.block < target.block
        return source.kind == target.kind == "B" and source.block > target.block

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
            ahead = self.warmup_forwards(stage, stages, micros)
            for step in range(micros + ahead):
                if step < micros:
                    yield from (Action("F", b, update, step) for b in blocks)
                if step >= ahead:
                    yield from (Action("B", b, update, step - ahead) for b in reversed(blocks))
            yield from (Action("U", b, update) for b in blocks)


@final
@dataclass(frozen=True)
class FillDrain(Flush):
    """All forwards, then all backwards: Huang et al. 2019, "GPipe"; every micro-batch is live.

    The paper draws the backwards in reverse; ascending takes equal time and one order of sums.
    """

    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        return micro_batches


@final
@dataclass(frozen=True)
class OneFOneB(Flush):
    """One forward, one backward: at most `stages - stage` micro-batches are live.

    Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training" (PipeDream-Flush);
    Fan et al. 2021, "DAPPLE". The warm-up is clamped, so fewer micro-batches than stages are legal.
    """

    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        return min(micro_batches, stages - 1 - stage)
