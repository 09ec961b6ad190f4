"""DiLoCo: rounds of local steps, whose mean movement is the gradient of an outer optimizer.

Replicas take `every` steps apart from the outer weights w (theirs are x_r); then with
d = mean over replicas of (w - x_r), as SGD with Nesterov momentum does in torch::

    v <- momentum v + d        w <- w - outer-lr (d + momentum v)        x_r <- w

Sends 2 (n - 1) / (n every) times the block's parameters per replica and update, of which
2 (m - 1) / (m every) per node between m nodes. Staleness 0. With outer rate 1 and momentum 0 it is
local SGD; with those, one replica is the identity up to rounding.

Source: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models",
arXiv 2311.08105. Its rounds have 500 updates, or 50, as here by default.

Invariant: the outer weights, their velocity and the start of a round are the same on all replicas;
inner optimizers stay local and are not reset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dtrain.syncs.base import UpdateClock, replica_mean, require_at_least, select_prefix
from dtrain.syncs.common.local_updates import PeriodicSync


@final
@dataclass
class DiLoCo(PeriodicSync):
    """An outer step per round; the outer weights are what is evaluated. A run ends on one.

    Attributes
    ----------
    every : int
        Updates of a round (H).
    outer_lr, outer_momentum : float
        Of the outer optimizer.
    """

    depends_on_run_length = True
    parameter_copies = 2
    every: int = 50
    outer_lr: float = 0.7
    outer_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__init__()
        require_at_least("every", self.every, 1)
        require_at_least("outer-lr", self.outer_lr, 0)
        require_at_least("outer-momentum", self.outer_momentum, 0)
        self._outer_weights: dict[str, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}

    def communication_cost(self) -> tuple[float, float]:
        """One per round."""
        return 1 / self.every, 1 / self.every

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Leave the gradients; keep the weights with which the first round begins."""
        if not self._outer_weights:
            self._outer_weights = {
                name: own.clone() for name, own in self.block.trainable_tensors().items()
            }
            self._velocity = {
                name: own.new_zeros(own.shape) for name, own in self._outer_weights.items()
            }

    def is_due(self, clock: UpdateClock) -> bool:
        """Every `every` updates, and at the end of the run."""
        return (clock.update + 1) % self.every == 0 or clock.ends_run

    def synchronise(self, clock: UpdateClock) -> None:
        """Take the outer step, and start from where it leads. Collective."""
        own, momentum = self.block.trainable_tensors(), self.outer_momentum
        moved = {name: self._outer_weights[name] - own[name] for name in own}
        self.compressor.mean_(self.replicas, moved, 1 / self.replicas.size, clock.update)
        for name, delta in moved.items():
            velocity = self._velocity[name].mul_(momentum).add_(delta)
            self._outer_weights[name].sub_(
                delta.add_(velocity, alpha=momentum), alpha=self.outer_lr
            )
            own[name].copy_(self._outer_weights[name])

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Return the outer weights, and the mean of all replicas' buffers; collective."""
        return (
            self.block.tensors()
            | self._outer_weights
            | replica_mean(self.replicas, self.block.unsynced_buffers)
        )

    def state(self) -> dict[str, Tensor]:
        """Return the outer weights and their velocity."""
        outer = {f"outer/{name}": each for name, each in self._outer_weights.items()}
        velocity = {f"velocity/{name}": each for name, each in self._velocity.items()}
        return super().state() | outer | velocity

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        super().restore(state)
        for held, root in ((self._outer_weights, "outer/"), (self._velocity, "velocity/")):
            held |= {name: each.clone() for name, each in select_prefix(state, root).items()}
