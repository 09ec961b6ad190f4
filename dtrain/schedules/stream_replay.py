"""`stream-replay`: `stream`, but a rank waits a bounded time for another one.

A rank keeps the last inputs that it received, in a buffer. A rank whose next input has not arrived
in time trains once more on an input of its buffer: the least used one, the newest of equals. A rank
whose next rank has not taken its earlier outputs in time leaves out an output. So a late rank does
not stop the others inside a segment; all ranks wait for each other at the end of a segment.

    stage 0   F0 B0 U  F1 B1 U  F2 B2 U  F3 B3 U
    stage 1            F0 B0 U  F1 B1 U  (late) .........  F2 B2 U
    stage 2                     F0 B0 U  F1 B1 U  F0 B0 U  F1 B1 U        replays 0 and 1

Invariant: every rank runs the plan of `stream`, so it takes as many updates. Where no rank is later
than `patience_s`, the run trains the same bits as `stream`. Otherwise the result depends on time.

Source: Belilovsky et al. 2020, "Decoupled Greedy Learning of CNNs", arXiv 1901.08164, section 4
(asynchronous, with a replay buffer of each module).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain.errors import ConfigError
from dtrain.schedules.actions import SKIP_PREFIX, Action, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.cyclic import cyclic_order


@final
@dataclass(frozen=True)
class StreamReplay(Schedule):
    """Run the order of `stream`, with inputs from a buffer in place of late ones.

    Attributes
    ----------
    buffer : int
        Inputs that a rank keeps for each block whose input comes from another rank.
    patience_s : float
        Seconds that a rank waits for an input, or for the next rank to take an output.

    Raises
    ------
    ConfigError
        Fields are out of range.
    """

    unsupported_routes: ClassVar[str] = (
        "'stream-replay' sends the output of a block to the next block, and nothing else: set "
        'schedule.name = "stream" or "pipelined"'
    )
    buffer: int = 4
    patience_s: float = 10.0

    def __post_init__(self) -> None:
        if self.buffer < 1 or not 0 <= self.patience_s < float("inf"):
            raise ConfigError(
                "schedule.replay-out-of-range",
                f"[schedule] buffer = {self.buffer} must be 1 or more, and patience-s = "
                f"{self.patience_s} must be 0 or more, and finite",
            )

    def supports(self, route: Route) -> bool:
        source, target = route.source, route.target
        return (
            source.kind == target.kind == "F"
            and not (source.pass_ or target.pass_ or route.lag or route.once)
            and target.block == source.block + 1
            and not route.name.startswith(SKIP_PREFIX)
        )

    def supports_all(self, routes: Sequence[Route]) -> bool:
        targets = [route.target for route in routes]
        return super().supports_all(routes) and len(targets) == len(set(targets))

    def check_routes(self, routes: Sequence[Route]) -> None:
        super().check_routes(routes)
        if not self.supports_all(routes):
            raise ConfigError(
                "schedule.replay-several-routes",
                "a block receives several tensors from the block before it, of which a late one "
                'cannot be replayed alone: set schedule.name = "stream"',
            )

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        return cyclic_order(stage, place, micro_batches, routes)
