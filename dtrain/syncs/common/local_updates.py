"""Replicas that train apart: each takes its own steps, and their mean is what is shown.

Invariant: while all hold the same parameters those are the view, bit for bit; else their plain mean
over replicas is, since a mean of equal numbers need not be that number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dtrain.syncs.base import Sync, UpdateClock, diverging_tensors, replica_mean, select_prefix


class LocalUpdates(Sync):
    """A sync whose replicas may differ at a segment's end; what a subclass does not say is nothing.

    A replica without a sample in an update takes no step in it, but takes part in every mean.
    """

    replicas_diverge = True

    @abstractmethod
    def after_update(self, clock: UpdateClock) -> None:
        """Change the parameters in place, and say in `equal` whether all replicas hold the same."""

    def end_epoch(self, loss: float) -> None:
        """Nothing follows from the loss."""

    def finish_pending(self) -> None:
        """Nothing to land, and no mean before its time."""

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the mean of all replicas' parameters and buffers; collective.

        Parameters that are equal anyway are not copied and keep their bits.
        """
        own = self.block.tensors()
        names = self.block.unsynced_buffers if self.in_sync else diverging_tensors(self.block)
        return own | replica_mean(self.replicas, {name: own[name] for name in names})

    def state(self) -> dict[str, Tensor]:
        """Return whether the replicas hold the same parameters."""
        return {"equal": torch.tensor(int(self.in_sync))}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self.in_sync = bool(state["equal"])


class PeriodicSync(LocalUpdates):
    """Steps apart and meetings; a subclass says when they meet, and may say what happens there.

    Where a carrier is not exact, what travels are the movements since the last meeting.
    """

    def __init__(self) -> None:
        self._base_weights: dict[str, Tensor] = {}

    @abstractmethod
    def is_due(self, clock: UpdateClock) -> bool:
        """Say whether the replicas meet after this update."""

    def synchronise(self, clock: UpdateClock) -> None:
        """Replace the parameters by their plain mean over the replicas. Collective."""
        own = self.block.trainable_tensors()
        if self.compressor.exact:
            self.replicas.mean_(own)
            return
        moved = {name: each - self._base_weights[name] for name, each in own.items()}
        self.compressor.mean_(self.replicas, moved, 1 / self.replicas.size, clock.update)
        for name, each in own.items():
            each.copy_(self._base_weights[name].add_(moved[name]))

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Keep the weights with which a round begins, where movements are to travel."""
        if self.in_sync and not self.compressor.exact:
            self._base_weights = {
                name: each.clone() for name, each in self.block.trainable_tensors().items()
            }

    def after_update(self, clock: UpdateClock) -> None:
        """Meet where it is time."""
        self.in_sync = self.is_due(clock)
        if self.in_sync:
            self.synchronise(clock)

    def state(self) -> dict[str, Tensor]:
        """Return whether the replicas hold the same parameters, and where they last did."""
        return super().state() | {f"base/{name}": each for name, each in self._base_weights.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        self._base_weights = {
            name: each.clone() for name, each in select_prefix(state, "base/").items()
        }
