"""Never: replicas train apart on their parts of every batch; their mean is what is evaluated.

Sends nothing while training, one mean of the block per view. With one replica it is the identity.

Invariant: no replica's parameters are ever changed by another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from dtrain.syncs.parts.apart import Apart
from dtrain.syncs.sync import Clock


@final
@dataclass
class Never(Apart):
    """No agreement at all: the baseline of every other sync, and an ensemble averaged late."""

    shrinks = False

    def means(self) -> tuple[float, float]:
        """None."""
        return 0.0, 0.0

    def after_update(self, clock: Clock) -> None:
        """Leave the parameters: from now on they are this replica's own."""
        self.equal = self.replicas.size == 1
