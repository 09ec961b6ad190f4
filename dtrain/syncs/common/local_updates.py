"""Base classes of local updates: replicas take local steps and average parameters periodically.

Invariant: while all replicas hold the same parameters, those are evaluated, bit for bit. Otherwise
their plain mean over replicas is. The two cases differ, because a mean of equal numbers need not be
that number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import (
    Sync,
    SyncTarget,
    SyncTraits,
    UpdateClock,
    add_prefix,
    clone_all,
    diverging_tensors,
    replica_mean,
    select_prefix,
)
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor


class LocalUpdates(Sync):
    """A sync whose replicas may differ at the end of a segment.

    A replica without samples in an update skips its step, but takes part in every mean. A subclass
    communicates in `after_update`; nothing else is sent by default.
    """

    def traits(self) -> SyncTraits:
        """Return traits of replicas that diverge."""
        return SyncTraits(replicas_diverge=True)

    @abstractmethod
    def after_update(self, clock: UpdateClock) -> None:
        """Change the parameters in place, and set `in_sync`."""

    def end_epoch(self, loss: float) -> None:
        """Ignore the loss."""

    def finish_pending(self) -> None:
        """Do nothing: no communication is in flight."""

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers, averaged over the replicas. Collective over the replicas.

        Parameters that are equal on all replicas are not copied and keep their bits.
        """
        tensors = self.block.tensors()
        names = self.block.unsynced_buffers if self.in_sync else diverging_tensors(self.block)
        diverging = {name: tensors[name] for name in names}
        return tensors | replica_mean(self.replicas, diverging, self.block.first_replica_buffers)

    def state(self) -> dict[str, Tensor]:
        """Return whether the replicas hold the same parameters."""
        return {"equal": torch.tensor(int(self.in_sync))}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load whether the replicas hold the same parameters."""
        self.in_sync = bool(state["equal"])


class PeriodicSync(LocalUpdates):
    """Rounds of local updates, each of which ends with a synchronisation.

    A subclass defines `is_due`; it may override `synchronise`, which averages the parameters.
    Where the compressor is lossy, the parameters' deltas since the last synchronisation are
    averaged instead.
    """

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach the sync to a block. Collective over the replicas."""
        super().setup(block, replicas, compressor)
        self._base_weights: dict[str, Tensor] = {}

    @abstractmethod
    def is_due(self, clock: UpdateClock) -> bool:
        """Return whether the replicas synchronise after this update; pure in clock and state."""

    def synchronise(self, clock: UpdateClock) -> None:
        """Replace the parameters by their plain mean over the replicas. Collective over them."""
        weights = self.block.trainable_tensors()
        if self.compressor.exact:
            self.replicas.mean_(weights)
            return
        deltas = {name: weight - self._base_weights[name] for name, weight in weights.items()}
        self.compressor.mean_(self.replicas, deltas, 1 / self.replicas.size, clock.update)
        for name, weight in weights.items():
            weight.copy_(self._base_weights[name].add_(deltas[name]))

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Copy the weights at the start of a round, where deltas are to be averaged."""
        if self.in_sync and not self.compressor.exact:
            self._base_weights = clone_all(self.block.trainable_tensors())

    def after_update(self, clock: UpdateClock) -> None:
        """Synchronise at the end of a round. Collective over the replicas."""
        self.in_sync = self.is_due(clock)
        if self.in_sync:
            self.synchronise(clock)

    def state(self) -> dict[str, Tensor]:
        """Return whether the replicas are equal, and the weights at the start of the round."""
        return super().state() | add_prefix("base/", self._base_weights)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load whether the replicas are equal, and the weights at the start of the round."""
        super().restore(state)
        self._base_weights = clone_all(select_prefix(state, "base/"))
