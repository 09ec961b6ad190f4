"""Interleaved 1F1B: v chunks per rank on a loop, hence a bubble that is v times smaller.

Invariant: micro-batches go in groups of P through all chunks of a rank. An incomplete group or
chunk is padded with slots that are skipped, so any number of either is legal.

    place 0 1 2 3 0 1 2 3        rank 0, two micro-batches: F0.0 F0.1 F4.0 F4.1 ...

Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain import partition
from dtrain.schedules import OneFOneB
from dtrain.schedules.actions import Action, Kind, Route
from dtrain.schedules.base import Schedule


@final
@dataclass(frozen=True)
class Interleaved(Schedule):
    """1F1B over the chunks of a loop."""

    unsupported_routes: ClassVar[str] = OneFOneB.unsupported_routes
    flushes: ClassVar[bool] = True

    def supports(self, route: Route) -> bool:
        return OneFOneB().supports(route)

    def assign_stages(
        self, costs: Sequence[float], stages: int, transfers: Sequence[float] = ()
    ) -> tuple[int, ...]:
        partition.assign_stages(costs, stages, transfers)  # refuses too many stages
        return tuple(block % stages for block in range(len(costs)))

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        stages = max(place) + 1
        chunks = range(stage, -(-len(place) // stages) * stages, stages)
        for update, micros in enumerate(micro_batches):
            groups = range(0, micros, stages)
            forwards, backwards = (
                [(b, m) for first in groups for b in order for m in range(first, first + stages)]
                for order in (chunks, chunks[::-1])
            )
            ahead = 2 * (stages - 1 - stage) + (len(chunks) - 1) * stages
            ahead = min(len(forwards), ahead)
            steps: list[tuple[Kind, list[tuple[int, int]]]] = [("F", forwards[:ahead])]
            for forward, backward in zip(forwards[ahead:], backwards, strict=False):
                steps += [("F", [forward]), ("B", [backward])]
            steps += [("B", backwards[len(forwards) - ahead :])]
            for kind, slots in steps:
                for block, micro in slots:
                    if block < len(place) and micro < micros:
                        yield Action(kind, block, update, micro)
            yield from (Action("U", b, update) for b in chunks if b < len(place))
