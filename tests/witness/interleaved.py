"""Interleaved 1F1B: several chunks a rank on a loop, hence a bubble that is v times smaller.

Invariant: micro-batches go in groups of P through all chunks of a rank. A group or a chunk that is
not full is filled with ghosts, which are skipped, so any number of either is legal.

    place 0 1 2 3 0 1 2 3        rank 0, two micro-batches: F0.0 F0.1 F4.0 F4.1 ...

Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain import partition
from dtrain.schedules import OneFOneB
from dtrain.schedules.actions import Action, Route
from dtrain.schedules.base import Schedule


@final
@dataclass(frozen=True)
class Interleaved(Schedule):
    """1F1B over the chunks of a loop."""

    unsupported_routes: ClassVar[str] = (
        "'interleaved' brings activations forward and gradients back"
    )
    flushes: ClassVar[bool] = True

    def supports(self, route: Route) -> bool:
        return OneFOneB().supports(route)

    def assign_stages(
        self, costs: Sequence[float], stages: int, transfers: Sequence[float] = ()
    ) -> tuple[int, ...]:
        partition.assign_stages(costs, stages, transfers)  # refuses what cannot be placed
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
            order = [
                [(b, m) for g in groups for b in way for m in range(g, g + stages)]
                for way in (chunks, chunks[::-1])
            ]
            ahead = min(len(order[0]), 2 * (stages - 1 - stage) + (len(chunks) - 1) * stages)
            steps = [("F", order[0][:ahead])]
            for pair in zip(order[0][ahead:], order[1], strict=False):
                steps += [("F", pair[:1]), ("B", pair[1:])]
            steps += [("B", order[1][len(order[0]) - ahead :])]
            for kind, slots in steps:
                real = ((b, m) for b, m in slots if b < len(place) and m < micros)
                yield from (Action(kind, block, update, micro) for block, micro in real)
            yield from (Action("U", b, update) for b in chunks if b < len(place))
