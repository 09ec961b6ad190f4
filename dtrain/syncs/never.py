"""Never: replicas train apart on their parts of every batch; their mean is what is evaluated.

Sends nothing while training, one mean of the block per view. With one replica it is the identity.

Invariant: no replica's parameters are ever changed by another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from dtrain.syncs.base import UpdateClock
from dtrain.syncs.common.local_updates import LocalUpdates


@final
@dataclass
class Never(LocalUpdates):
    """No agreement at all: the baseline of every other sync, and an ensemble averaged late."""

    compressible = False

    def communication_cost(self) -> tuple[float, float]:
        """None."""
        return 0.0, 0.0

    def after_update(self, clock: UpdateClock) -> None:
        """Leave the parameters: from now on they are this replica's own."""
        self.in_sync = self.replicas.size == 1
