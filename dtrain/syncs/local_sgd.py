"""Local SGD: replicas take `every` optimizer steps apart, then their parameters are averaged.

Sends 2 (n - 1) / (n every) times the block's parameters per replica and update; until the
warm-up is over, every update's gradients as `every-step` does. Staleness 0. With one replica it is
the identity.

Source: Stich 2019, "Local SGD Converges Fast and Communicates Little"; with `warmup-updates`
Lin et al. 2020, "Don't Use Large Mini-Batches, Use Local SGD" (post-local SGD).

Invariant: who averages when follows from the number of the update alone, counted from the start of
the run, so neither segments nor resuming move a synchronisation.

::

    every = 3, warmup-updates = 2        g gradients, p parameters averaged

    update      0   1 | 2   3   4   5   6   7   8
    averaged    g   g | p           p           p       where (update + 1) % every = 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from dtrain.errors import Refusal
from dtrain.syncs.sync import Clock, Sync, averaged, moving


@final
@dataclass
class LocalSGD(Sync):
    """The plain mean of parameters over replicas, now and then; optimizer state stays local.

    The mean is over replicas, not over samples: a replica with a sample less counts as much, and
    one without a sample in an update takes no step in it but takes part in the mean. In the warm-up
    gradients are means over samples, all replicas step, and so they end it with the same momentum.

    Attributes
    ----------
    every : int
        Updates between two means of the parameters (H).
    warmup_updates : int
        Updates at the start whose gradients are averaged instead.
    """

    apart: ClassVar[bool] = True
    every: int = 8
    warmup_updates: int = 0

    def __post_init__(self) -> None:
        for key, value, low in (
            ("every", self.every, 1),
            ("warmup-updates", self.warmup_updates, 0),
        ):
            if value < low:
                raise Refusal(f"[sync] {key} = {value} is too small: give at least {low}")

    def steps(self, weight: float, clock: Clock) -> bool:
        """In the warm-up every replica steps: all have the gradient of all samples."""
        return weight > 0 or clock.update < self.warmup_updates

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """In the warm-up, replace each gradient by its mean over the samples of all replicas."""
        if clock.update < self.warmup_updates:
            self.replicas.mean_(gradients, weight)

    def after_update(self, clock: Clock) -> None:
        """Where it is time, replace the parameters by their mean over the replicas."""
        if clock.update < self.warmup_updates:
            return
        self.equal = (clock.update + 1) % self.every == 0
        if self.equal:
            self.replicas.mean_([each.detach() for each in self.block.trained])

    def poll(self) -> None:
        """Nothing is ever in flight."""

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
