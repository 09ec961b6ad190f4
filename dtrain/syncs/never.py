"""Independent replicas: no communication in training; the mean of the replicas is evaluated.

Sends nothing per update, and one mean of the block per evaluation. One replica is the identity.

Invariant: no replica's parameters are ever changed by another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from dtrain.syncs.base import SyncTraits, UpdateClock
from dtrain.syncs.common.local_updates import LocalUpdates


@final
@dataclass
class Never(LocalUpdates):
    """No synchronisation: one-shot averaging, the baseline of all other syncs."""

    def traits(self) -> SyncTraits:
        """Return traits of diverging replicas without any transfer."""
        return replace(super().traits(), compressible=False)

    def communication_cost(self) -> tuple[float, float]:
        """Return no means at all."""
        return 0.0, 0.0

    def after_update(self, clock: UpdateClock) -> None:
        """Keep the parameters: from the first update on they are this replica's own."""
        self.in_sync = self.replicas.size == 1
