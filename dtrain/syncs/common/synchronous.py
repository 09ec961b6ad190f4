"""The base class of synchronous data parallelism: one mean gradient per update for all replicas.

Invariant: replicas that start equal stay equal bit for bit, because all apply the same sum.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dtrain.syncs.base import Sync, SyncTraits, has_mean, replica_mean


class SynchronousSync(Sync):
    """A sync whose replicas are always equal; `gradient_group` returns all of them."""

    def traits(self) -> SyncTraits:
        """Return traits without divergence."""
        return SyncTraits(replicas_diverge=False)

    def end_epoch(self, loss: float) -> None:
        """Ignore the loss."""

    def finish_pending(self) -> None:
        """Average the unsynced buffers in place. Collective over the replicas.

        Integer buffers (counts of batch norm) become those of replica 0: they differ by an update
        in which a replica had no samples. So do those that have no mean.
        """
        buffers, first_replica = self.block.unsynced_buffers, self.block.first_replica_buffers
        for name, mean in replica_mean(self.replicas, buffers, first_replica).items():
            buffers[name].copy_(mean)
        self.replicas.broadcast_([b for b in buffers.values() if not has_mean(b)])

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the block's own tensors, not copied: all replicas hold the same ones."""
        return self.block.tensors()

    def state(self) -> dict[str, Tensor]:
        """Return no tensors: the block's state is all there is."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore nothing beyond the block."""
