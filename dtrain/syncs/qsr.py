"""QSR: local SGD whose rounds grow with the inverse square of the learning rate.

A round has H = max(every, floor((alpha / lr) ** power)) updates, where lr is the rate of its first
update. H is `every` in the warm-up of the learning rate. A round never has more updates than the
run has left, so a run ends on a mean. Each replica sends 2 (n - 1) / (n H) times the block's
parameters per update, of which 2 (m - 1) / (m H) per node between m nodes. Staleness 0. One replica
is the identity.

Source: Gu et al. 2024, "A Quadratic Synchronization Rule for Distributed Deep Learning",
arXiv 2310.14423. `power` = 2 is the rule, 1 the one with H proportional to 1 / lr.

Invariant: H never changes inside a round, and is part of the state.

::

    lr         1    1    1    .5   .5   .5   .5   .5         every = 1, alpha / lr = 1 and 2
    mean       |    |    |                   |    ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, pow
from typing import final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, SyncTraits, UpdateClock, require_at_least
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.common.local_updates import PeriodicSync


@final
@dataclass
class QSR(PeriodicSync):
    """Quadratic synchronization rule.

    Attributes
    ----------
    every : int
        The least length of a round (H_base).
    alpha_over_peak : float
        The paper's alpha as a multiple of the optimizer's own learning rate; it tuned 0.0175 for
        ViT-B at a peak rate of 0.008. 0: every round has `every` updates.
    power : float
        The exponent.
    """

    every: int = 4
    alpha_over_peak: float = 0.0175 / 0.008
    power: float = 2.0

    def __post_init__(self) -> None:
        require_at_least("every", self.every, 1)
        require_at_least("alpha-over-peak", self.alpha_over_peak, 0)
        require_at_least("power", self.power, 0)

    def traits(self) -> SyncTraits:
        """Return traits of rounds that depend on the length of the run."""
        return replace(super().traits(), depends_on_run_length=True)

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach the sync to a block. Collective over the replicas."""
        super().setup(block, replicas, compressor)
        self._round_end = 0

    def communication_cost(self) -> tuple[float, float]:
        """Return one mean per round of the least length."""
        return 1 / self.every, 1 / self.every

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Compute the end of a round at its start."""
        super().before_update(gradients, weight, clock)
        if clock.update >= self._round_end:
            self._round_end = min(clock.update + self.round_length(clock), clock.total_updates)

    def round_length(self, clock: UpdateClock) -> int:
        """Return the updates of a round that starts now (H)."""
        if clock.in_lr_warmup or not clock.lr:
            return self.every
        alpha_over_lr = self.alpha_over_peak * clock.base_lr / clock.lr
        return max(self.every, floor(pow(alpha_over_lr, self.power)))

    def is_due(self, clock: UpdateClock) -> bool:
        """Synchronise at the end of a round."""
        return clock.update + 1 == self._round_end

    def state(self) -> dict[str, Tensor]:
        """Return the state of a periodic sync, and the end of the round."""
        return super().state() | {"end": torch.tensor(self._round_end)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the state of a periodic sync, and the end of the round."""
        super().restore(state)
        self._round_end = int(state["end"])
