"""Synchronous data parallelism: one all-reduce of the gradients per update, as DDP does.

The all-reduce overlaps with the backward pass. Each replica sends 2 (n - 1) / n times the block's
parameters per update; staleness 0. One replica is the identity.

Invariant: replicas that start equal stay equal bit for bit, because all apply the same sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from dtrain.syncs.base import UpdateClock
from dtrain.syncs.common.synchronous import SynchronousSync
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass
class EveryStep(SynchronousSync):
    """All-reduce of gradients, weighted by samples: a mean over samples."""

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return all replicas, in every update."""
        return WeightedGroup(self.replicas, weight)

    def after_update(self, clock: UpdateClock) -> None:
        """Do nothing: equal gradients moved equal parameters."""
