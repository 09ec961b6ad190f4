"""Replicas that train apart: each takes its own steps, and their mean is what is shown.

Invariant: while all hold the same parameters those are the view, bit for bit; else their plain mean
over replicas is, since a mean of equal numbers need not be that number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.syncs.sync import Clock, Sync, averaged, moving


class Apart(Sync):
    """A sync whose replicas may differ at a segment's end; what a subclass does not say is nothing.

    A replica without a sample in an update takes no step in it, but takes part in every mean.
    """

    apart = True

    @abstractmethod
    def after_update(self, clock: Clock) -> None:
        """Change the parameters in place, and say in `equal` whether all replicas hold the same."""

    def end_epoch(self, loss: float) -> None:
        """Nothing follows from the loss."""

    def settle(self) -> None:
        """Nothing to land, and no mean before its time."""

    def view(self) -> dict[str, Tensor]:
        """Return the mean of all replicas' parameters and buffers; collective.

        Parameters that are equal anyway are not copied and keep their bits.
        """
        own = self.block.tensors()
        names = self.block.drifting if self.equal else moving(self.block)
        return own | averaged(self.replicas, {name: own[name] for name in names})

    def state(self) -> dict[str, Tensor]:
        """Return whether the replicas hold the same parameters."""
        return {"equal": torch.tensor(int(self.equal))}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self.equal = bool(state["equal"])
