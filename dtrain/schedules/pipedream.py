"""PipeDream: one forward, one backward in turns, without a flush.

Invariant: blocks are the stages of the papers, on any number of ranks: K of them, and block b is
K-1-b updates late. A backward uses the weights of its forward, so each gradient is one.

Three blocks on three ranks, as `draw` shows them: `pipedream`, and `pipedream-2bw` with four
micro-batches an update, where the forwards of an update begin before the last one is learnt.

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

from dtrain.errors import Refusal
from dtrain.schedules.action import Action, Route
from dtrain.schedules.cycles import cycles, feeds_back, lateness
from dtrain.schedules.late import Late
from dtrain.schedules.policy import Policy
from dtrain.schedules.schedule import Schedule

PERIOD = 2
"""Cycles from one micro-batch to the next: one of its forward, one of its backward."""


@dataclass(frozen=True)
class _Line(Schedule):
    """A schedule of what goes down the line of blocks forward, and comes back up."""

    limit: ClassVar[str] = (
        "it brings activations to later blocks and gradients to earlier ones, in one pass; for "
        'anything else set schedule.name = "pipelined"'
    )

    def runs(self, route: Route) -> bool:
        source, target = route.source, route.target
        if route.lag or source.pass_ or target.pass_ or source.kind != target.kind:
            return False
        forward, back = source.block < target.block, source.block > target.block
        return forward if source.kind == "F" else source.kind == "B" and back

    def serves(self, routes: Sequence[Route]) -> bool:
        return super().serves(routes) and (feeds_back(routes) or not routes)

    def admit(self, routes: Sequence[Route]) -> None:
        super().admit(routes)
        if not self.serves(routes):
            raise Refusal(
                "nothing comes back to earlier blocks here, so there is no pipeline to keep full: "
                'set schedule.name = "stream", which is never late'
            )


@final
@dataclass(frozen=True)
class PipeDream(_Line, Late):
    """PipeDream with weight stashing: K-b versions of block b; the newest goes forward.

    Attributes
    ----------
    vertical_sync : bool
        A micro-batch meets the same version in all blocks, that of block 0 when it enters: every
        block is K-1 updates late, and has K versions.
    """

    name: ClassVar[str] = "pipedream"
    period: ClassVar[int] = PERIOD
    weights: Literal["current", "stash"] = "stash"
    vertical_sync: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vertical_sync and (self.weights != "stash" or self.prediction != "none"):
            raise Refusal(
                "[schedule] vertical-sync chooses the weights of forwards and backwards: leave out "
                "weights and prediction"
            )

    def policy(self, place: Sequence[int], routes: Sequence[Route]) -> Policy:
        plain = super().policy(place, routes)
        if not self.vertical_sync:
            return plain
        lag = max(each.delay for each in plain.lateness)
        late = tuple(each._replace(delay=lag) for each in plain.lateness)
        return replace(plain, lag=lag, lateness=late)


@final
@dataclass(frozen=True)
class TwoBuffered(_Line):
    """PipeDream-2BW: gradients of an update's micro-batches add up; all are one update late.

    w(t+1) = w(t) - step of the gradient at w(t-1), in every block: two versions of the weights.
    """

    late: ClassVar[bool] = True

    def plan(
        self, stage: int, place: Sequence[int], sizes: Sequence[int], routes: Sequence[Route]
    ) -> Iterator[Action]:
        self.admit(routes)
        most, least = max(sizes, default=0), len(place) - 1
        if 0 < most < least:
            raise Refusal(
                f"'pipedream-2bw' with {len(place)} blocks needs {least} micro-batches or more in "
                f"an update, or two versions are not enough; found {most}: set micro-batches"
            )
        return cycles(stage, place, sizes, routes, period=PERIOD)

    def policy(self, place: Sequence[int], routes: Sequence[Route]) -> Policy:
        late = tuple(each._replace(delay=1) for each in lateness(place, routes, PERIOD))
        return Policy(late, stash=True, lag=1)
