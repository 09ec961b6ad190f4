"""Every step: the mean gradient of all replicas before each update, begun while it is computed.

Sends 2 (n - 1) / n times the block's parameters per replica and update; staleness 0.
With one replica it is the identity.

Invariant: replicas that start equal stay equal bit for bit, because all apply the same sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from dtrain.syncs.base import UpdateClock
from dtrain.syncs.common.synchronous import SynchronousSync


@final
@dataclass
class EveryStep(SynchronousSync):
    """All-reduce of gradients, weighted by samples: a mean over samples."""

    def after_update(self, clock: UpdateClock) -> None:
        """Nothing: equal gradients moved equal parameters."""
