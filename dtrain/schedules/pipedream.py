"""PipeDream and PipeDream-2BW: one forward and one backward in turns, without a flush.

Invariant: the stages of the papers are blocks here, on any number of ranks. Block b of K is K-1-b
updates late. A backward uses the weights of its forward, so it computes a true gradient.

Three blocks on three ranks, as `timeline_text` draws them: `pipedream`, and `pipedream-2bw` with
four micro-batches per update, where the forwards of an update begin before the last backward of
the update before.

    stage 0 |0 1 2 . . . . a U 3 b U 4 c U    stage 0 |0 1 2 . . . . a a 3 b b 0 c c 1 d U
    stage 1 |. 0 1 . . a U 2 b U 3 c U 4 d    stage 1 |. 0 1 . . a a 2 b b 3 c c 0 d U 1 a
    stage 2 |. . 0 a U 1 b U 2 c U 3 d U 4    stage 2 |. . 0 a a 1 b b 2 c c 3 d U 0 a a 1

Sources: Narayanan et al. 2019, "PipeDream: Generalized Pipeline Parallelism for DNN Training";
Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training", arXiv 2006.09503 (2BW).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

from dtrain.errors import ConfigError
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.schedules.cyclic import block_delays, cyclic_order, update_cycles
from dtrain.schedules.linear_pipeline import LinearPipeline
from dtrain.schedules.update_lags import UpdateCycles
from dtrain.schedules.weight_policy import WeightPolicy

PERIOD = 2
"""Cycles from one micro-batch to the next: one for its forward, one for its backward."""


@final
@dataclass(frozen=True)
class PipeDream(LinearPipeline, AsyncSchedule):
    """PipeDream with weight stashing: K-b versions of block b; a forward uses the newest.

    Attributes
    ----------
    vertical_sync : bool
        Whether a micro-batch uses the same version in all blocks, that of block 0 when it enters:
        every block is then K-1 updates late and has K versions.

    Raises
    ------
    ConfigError
        `vertical_sync` is combined with `weights` or `prediction`.
    """

    name: ClassVar[str] = "pipedream"
    period: ClassVar[int] = PERIOD
    weights: Literal["current", "stash"] = "stash"
    vertical_sync: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vertical_sync and (self.weights != "stash" or self.prediction != "none"):
            raise ConfigError(
                "schedule.vertical-sync-with-other-weights",
                "[schedule] vertical-sync already chooses the weights of forwards and backwards: "
                "leave out weights and prediction",
            )

    def policy(self, place: Sequence[int], routes: Sequence[Route]) -> WeightPolicy:
        policy = super().policy(place, routes)
        if not self.vertical_sync:
            return policy
        lag = max(delay.updates for delay in policy.delays)
        delays = tuple(delay._replace(updates=lag) for delay in policy.delays)
        return replace(policy, lag=lag, delays=delays)


@final
@dataclass(frozen=True)
class PipeDream2BW(LinearPipeline):
    """PipeDream-2BW: accumulate the gradients of an update's micro-batches, one update late.

    w(t+1) = w(t) - step of the gradient at w(t-1), in every block: two versions of the weights.
    """

    asynchronous: ClassVar[bool] = True

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        largest, minimum = max(micro_batches, default=0), len(place) - 1
        if 0 < largest < minimum:
            raise ConfigError(
                "schedule.too-few-micro-batches",
                f"micro-batches = {largest} is too few for 'pipedream-2bw' with {len(place)} "
                f"blocks, where two weight versions would not be enough: "
                f"set micro-batches = {minimum} or more",
            )
        return cyclic_order(stage, place, micro_batches, routes, period=PERIOD)

    def policy(self, place: Sequence[int], routes: Sequence[Route]) -> WeightPolicy:
        delays = block_delays(place, routes, PERIOD)
        return WeightPolicy(tuple(delay._replace(updates=1) for delay in delays), stash=True, lag=1)

    def update_cycles(self, blocks: int, routes: Sequence[Route]) -> UpdateCycles | None:
        """Return the cycles with the fewest micro-batches that are legal; with more of them the
        lags are the same."""
        return update_cycles(blocks, routes, PERIOD, max(blocks - 1, 1))
