"""GPipe (`fill-drain`) and 1F1B: backpropagation with a pipeline flush at the end of every update.

Invariant: both run backwards in the order 0 .. M-1 and update once after the last `B`. They differ
only in how many forwards a stage runs first, so they train the same model and differ in memory.

Three stages, four micro-batches, as `timeline_text` draws them (digits F, letters B, U the update):

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

from dtrain.errors import ConfigError
from dtrain.partition import is_ascending
from dtrain.schedules.actions import Action, Kind, Route
from dtrain.schedules.base import Schedule, blocks_of_stage


class Flush(Schedule):
    """Run warm-up forwards, then forward and backward in turns, then the remaining backwards."""

    unsupported_routes: ClassVar[str] = (
        "flush schedules send activations to later blocks and gradients to earlier blocks, in one "
        "forward pass; an error for all blocks must leave the last block's B, not its F; for "
        'other routes to later blocks set schedule.name = "stream"'
    )

    flushes: ClassVar[bool] = True

    @abstractmethod
    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        """Return how many forwards a stage runs before its first backward.

        At most `micro_batches`, the number of micro-batches of the update.
        """

    def step_offsets(
        self, stage: int, stages: int, micro_batches: int
    ) -> tuple[tuple[Kind, int], ...]:
        """Return the kinds that a step runs, in order, each with the step of its micro-batch 0."""
        return ("F", 0), ("B", self.warmup_forwards(stage, stages, micro_batches))

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
            offsets = self.step_offsets(stage, stages, micros)
            for step in range(micros + max(offset for _, offset in offsets)):
                for kind, offset in offsets:
                    if 0 <= step - offset < micros:
                        order = blocks if kind == "F" else blocks[::-1]
                        yield from (Action(kind, b, update, step - offset) for b in order)
            yield from (Action("U", b, update) for b in blocks)


@final
@dataclass(frozen=True)
class FillDrain(Flush):
    """GPipe (Huang et al. 2019): all forwards, then all backwards; every micro-batch is live.

    The paper draws the backwards in reverse order. Ascending order takes the same time and sums
    gradients in the same order as 1F1B.
    """

    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        return micro_batches


@final
@dataclass(frozen=True)
class OneFOneB(Flush):
    """1F1B: one forward, one backward; at most `stages - stage` micro-batches are live.

    PipeDream-Flush (Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training");
    DAPPLE (Fan et al. 2021). The warm-up is clamped, so an update may have fewer micro-batches
    than there are stages.
    """

    def check_places(self, place: Sequence[int]) -> None:
        if not is_ascending(place):
            raise ConfigError(
                "schedule.places-not-ascending",
                f"[partition] places = {list(place)}: '1f1b' runs the blocks of a stage one after "
                "the other, so places must ascend, as in [0, 0, 1]; for a V set schedule.name = "
                '"fold", for a loop "interleaved", for any other places "drained"',
            )

    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        return min(micro_batches, stages - 1 - stage)
