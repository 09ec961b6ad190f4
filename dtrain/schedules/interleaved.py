"""`interleaved`: 1F1B with v blocks on each rank of a loop, hence a bubble that is v times smaller.

Invariant: micro-batches go in groups of P through all blocks of a rank. An incomplete group, or a
rank with a block less, is padded with slots that are skipped, so any number of either is legal.

Eight blocks on four ranks:

    0 1 2 3 4 5 6 7        blocks        rank 0, four micro-batches:
    0 1 2 3 0 1 2 3        places        F0.0 F0.1 F0.2 F0.3 F4.0 ... B4.0 ...

Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain import partition
from dtrain.errors import ConfigError
from dtrain.schedules.actions import Action, Kind, Route
from dtrain.schedules.base import Schedule
from dtrain.schedules.gpipe_1f1b import OneFOneB


@final
@dataclass(frozen=True)
class Interleaved(Schedule):
    """1F1B over the blocks of a loop."""

    unsupported_routes: ClassVar[str] = (
        "'interleaved' runs the routes of backpropagation between neighbouring blocks, and skips; "
        'for an error that goes to all blocks at once set schedule.name = "1f1b", for any other '
        'route "drained"'
    )
    flushes: ClassVar[bool] = True

    def supports(self, route: Route) -> bool:
        source, target = route.source.block, route.target.block
        passes = max(0, abs(source - target) - 1)
        return OneFOneB().supports(route) and (route.lag > 0 or passes == route.blocks_passed)

    def assign_stages(
        self, costs: Sequence[float], stages: int, transfers: Sequence[float] = ()
    ) -> tuple[int, ...]:
        partition.assign_stages(costs, stages, transfers)  # refuses too many stages
        return _loop(len(costs), stages)

    def check_places(self, place: Sequence[int]) -> None:
        loop = _loop(len(place), max(place) + 1)
        if tuple(place) != loop:
            raise ConfigError(
                "schedule.places-no-loop",
                f"[partition] places = {list(place)}: 'interleaved' runs blocks on a loop alone, "
                f'{list(loop)}: leave out places, or for a V set schedule.name = "fold", for any '
                'other places "drained"',
            )

    def plan(
        self,
        stage: int,
        place: Sequence[int],
        micro_batches: Sequence[int],
        routes: Sequence[Route],
    ) -> Iterator[Action]:
        self.check_routes(routes)
        stages = max(place) + 1
        rounds = -(-len(place) // stages)
        blocks = range(stage, rounds * stages, stages)
        for update, micros in enumerate(micro_batches):
            forwards, backwards = (
                _slots(order, micros, stages) for order in (blocks, blocks[::-1])
            )
            ahead = min(len(forwards), _warmup_slots(stage, stages, rounds))
            steps: list[tuple[Kind, list[tuple[int, int]]]] = [("F", forwards[:ahead])]
            for forward, backward in zip(forwards[ahead:], backwards, strict=False):
                steps += [("F", [forward]), ("B", [backward])]
            steps += [("B", backwards[len(forwards) - ahead :])]
            for kind, slots in steps:
                for block, micro in slots:
                    if block < len(place) and micro < micros:
                        yield Action(kind, block, update, micro)
            yield from (Action("U", b, update) for b in blocks if b < len(place))


def _loop(blocks: int, stages: int) -> tuple[int, ...]:
    """Return the stage of each block on a loop."""
    return tuple(block % stages for block in range(blocks))


def _slots(blocks: Sequence[int], micros: int, stages: int) -> list[tuple[int, int]]:
    """Return (block, micro-batch) in groups of `stages` micro-batches, the last one padded."""
    groups = range(0, micros, stages)
    return [(b, m) for first in groups for b in blocks for m in range(first, first + stages)]


def _warmup_slots(stage: int, stages: int, rounds: int) -> int:
    """Return how many forwards a rank runs before its first backward; with one round as 1F1B."""
    after = stages - 1 - stage
    return after if rounds == 1 else 2 * after + (rounds - 1) * stages
