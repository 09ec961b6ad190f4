"""Never: replicas train apart on their parts of every batch; their mean is what is evaluated.

Sends nothing while training, one mean of the block per view. With one replica it is the identity.

Invariant: no replica's parameters are ever changed by another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dtrain.syncs.sync import Clock, Sync, averaged, moving


@dataclass
class Never(Sync):
    """No agreement at all: the baseline of every other sync, and an ensemble averaged late."""

    apart: ClassVar[bool] = True

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """Leave the gradients: each is already the mean over this replica's samples."""

    def after_update(self, clock: Clock) -> None:
        """Leave the parameters: from now on they are this replica's own."""
        self.equal = self.replicas.size == 1

    def poll(self) -> None:
        """Nothing is ever in flight."""

    def end_epoch(self, loss: float) -> None:
        """Nothing follows from the loss."""

    def settle(self) -> None:
        """Nothing to land."""

    def view(self) -> dict[str, Tensor]:
        """Return the mean of all replicas' parameters and buffers; collective, a copy of what
        moves."""
        return self.block.tensors() | averaged(self.replicas, moving(self.block))

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the block."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing beyond the block; what is restored had been updated."""
        self.equal = self.replicas.size == 1
