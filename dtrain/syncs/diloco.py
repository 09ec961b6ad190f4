"""DiLoCo: rounds of local steps; the mean delta of a round is the gradient of an outer optimizer.

Replicas take `every` steps from the outer weights w to their own x_r. Then, with the mean delta
d = mean over replicas of (w - x_r), an outer SGD with Nesterov momentum as in torch takes a step::

    v <- momentum v + d        w <- w - outer-lr (d + momentum v)        x_r <- w

Each replica sends 2 (n - 1) / (n every) times the block's parameters per update, of which
2 (m - 1) / (m every) per node between m nodes. Staleness 0. With `outer_lr` 1 and `outer_momentum`
0 it is local SGD; with those, one replica is the identity up to rounding.

Source: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models",
arXiv 2311.08105. Its rounds have 500 updates, or 50, as here by default.

Invariant: the outer weights and their velocity are the same on all replicas; inner optimizers stay
local and are not reset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from dtrain.block.complex_tensors import view_as_originals
from dtrain.comm.communicator import Comm
from dtrain.syncs.base import (
    SyncTarget,
    SyncTraits,
    UpdateClock,
    add_prefix,
    clone_all,
    replica_mean,
    require_at_least,
    select_prefix,
)
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.common.local_updates import PeriodicSync


@final
@dataclass
class DiLoCo(PeriodicSync):
    """Distributed low-communication training. A run ends on an outer step.

    Attributes
    ----------
    every : int
        Updates of a round (H).
    outer_lr, outer_momentum : float
        Learning rate and Nesterov momentum of the outer optimizer.
    """

    every: int = 50
    outer_lr: float = 0.7
    outer_momentum: float = 0.9

    def __post_init__(self) -> None:
        require_at_least("every", self.every, 1)
        require_at_least("outer-lr", self.outer_lr, 0)
        require_at_least("outer-momentum", self.outer_momentum, 0)

    def traits(self) -> SyncTraits:
        """Return traits of diverging replicas with outer weights and their velocity."""
        return replace(super().traits(), depends_on_run_length=True, parameter_copies=2)

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach the sync to a block. Collective over the replicas."""
        super().setup(block, replicas, compressor)
        self._outer_weights: dict[str, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}

    def communication_cost(self) -> tuple[float, float]:
        """Return one mean per round."""
        return 1 / self.every, 1 / self.every

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Copy the outer weights at the start of the run."""
        if not self._outer_weights:
            weights = self.block.trainable_tensors()
            self._outer_weights = clone_all(weights)
            self._velocity = {name: w.new_zeros(w.shape) for name, w in weights.items()}

    def is_due(self, clock: UpdateClock) -> bool:
        """Synchronise every `every` updates, and at the end of the run."""
        return (clock.update + 1) % self.every == 0 or clock.ends_run

    def synchronise(self, clock: UpdateClock) -> None:
        """Take an outer step, and set all replicas to its result. Collective over the replicas."""
        weights, momentum = self.block.trainable_tensors(), self.outer_momentum
        deltas = {name: self._outer_weights[name] - weights[name] for name in weights}
        self.compressor.mean_(self.replicas, deltas, 1 / self.replicas.size, clock.update)
        for name, delta in deltas.items():
            velocity = self._velocity[name].mul_(momentum).add_(delta)
            step = delta.add_(velocity, alpha=momentum)
            self._outer_weights[name].sub_(step, alpha=self.outer_lr)
            weights[name].copy_(self._outer_weights[name])

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the outer weights, and the mean of buffers. Collective over the replicas."""
        buffers = replica_mean(
            self.replicas, self.block.unsynced_buffers, self.block.first_replica_buffers
        )
        tensors = self.block.tensors()
        return tensors | view_as_originals(self._outer_weights, tensors) | buffers

    def state(self) -> dict[str, Tensor]:
        """Return the outer weights and their velocity."""
        return {
            **super().state(),
            **add_prefix("outer/", self._outer_weights),
            **add_prefix("velocity/", self._velocity),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the outer weights and their velocity."""
        super().restore(state)
        self._outer_weights = clone_all(select_prefix(state, "outer/"))
        self._velocity = clone_all(select_prefix(state, "velocity/"))
