"""Alike: replicas that apply the same mean gradient in every update.

Invariant: replicas that start equal stay equal bit for bit, because all apply the same sum.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dtrain.syncs.base import Sync, UpdateClock, replica_mean
from dtrain.syncs.gradient_reducer import WeightedGroup


class SynchronousSync(Sync):
    """A sync whose replicas never differ; what a subclass does not say is nothing."""

    replicas_diverge = False

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Over all replicas, in every update."""
        return WeightedGroup(self.replicas, weight)

    def end_epoch(self, loss: float) -> None:
        """Nothing follows from the loss."""

    def finish_pending(self) -> None:
        """Average the buffers (batch statistics) over replicas, in place; counts are the first's.

        The counts of replicas may differ by an update that had no sample for one of them.
        """
        buffers = self.block.unsynced_buffers
        for name, mean in replica_mean(self.replicas, buffers).items():
            buffers[name].copy_(mean)
        self.replicas.broadcast_([b for b in buffers.values() if not b.is_floating_point()])

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the block's own tensors, not copied: all replicas hold the same."""
        return self.block.tensors()

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the block."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing beyond the block."""
