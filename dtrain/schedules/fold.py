"""`fold`: `drained` cycles on a V, so the first rank holds the first and the last block.

Invariant: the order is that of `drained`, which restarts with every update; so nothing is stale and
any other placement is legal, too.

Eight blocks on four ranks (blocks above, places below):

    0 1 2 3 4 5 6 7
    0 1 2 3 3 2 1 0        the messages between blocks 3 and 4 stay on one rank

With two blocks on each of P ranks and M >= 2 P micro-batches the bubble is (P-1)/(2M+P-1), half of
that of 1F1B. Sources of the V: Liu et al. 2023, "Hanayo" (a wave); Qi et al. 2024, "Pipeline
Parallelism with Controllable Memory" (V-shaped building blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from dtrain import partition
from dtrain.schedules.drained import Drained


@final
@dataclass(frozen=True)
class Fold(Drained):
    """Run cycles that restart with every update, on a V."""

    unsupported_routes: ClassVar[str] = "'fold' runs every route"

    def assign_stages(
        self, costs: Sequence[float], stages: int, transfers: Sequence[float] = ()
    ) -> tuple[int, ...]:
        partition.assign_stages(costs, stages, transfers)  # refuses too many stages
        parts = partition.assign_stages(costs, min(len(costs), 2 * stages), transfers)
        return tuple(part if part < stages else 2 * stages - 1 - part for part in parts)
