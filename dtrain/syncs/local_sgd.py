"""Local SGD: replicas take `every` optimizer steps apart, then their parameters are averaged.

Sends 2 (n - 1) / (n every) times the block's parameters per replica and update, of which
2 (m - 1) / (m every) per node between m nodes; until the warm-up is over, every update's gradients
as `every-step` does; with `within = "node"` also 2 (g - 1) / g times the gradients per update
inside a node of g replicas. Staleness 0. With one replica it is the identity.

Source: Stich 2019, "Local SGD Converges Fast and Communicates Little"; with `warmup-updates` and
`within = "node"` Lin et al. 2020, "Don't Use Large Mini-Batches, Use Local SGD" (post-local SGD).

Invariant: who averages when follows from the number of the update alone, counted from the start of
the run, so neither segments nor resuming move a synchronisation.

::

    every = 3, warmup-updates = 2        g gradients, p parameters averaged

    update      0   1 | 2   3   4   5   6   7   8
    averaged    g   g | p           p           p       where (update + 1) % every = 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, UpdateClock, require_at_least
from dtrain.syncs.common.local_updates import PeriodicSync
from dtrain.syncs.common.node_groups import NodeGroups
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass
class LocalSGD(PeriodicSync):
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
    within : "replica" or "node"
        Who steps apart: each replica, or each node, whose replicas then average the gradients of
        every update among themselves.
    """

    every: int = 8
    warmup_updates: int = 0
    within: Literal["replica", "node"] = "replica"

    def __post_init__(self) -> None:
        super().__init__()
        require_at_least("every", self.every, 1)
        require_at_least("warmup-updates", self.warmup_updates, 0)

    def setup(self, block: SyncTarget, replicas: Comm) -> None:
        """Take the block and its replicas, by node where those of a node step together."""
        super().setup(block, replicas)
        self._nodes = NodeGroups(replicas) if self.within == "node" else None

    def communication_cost(self) -> tuple[float, float]:
        """One per round; inside a node that steps together one per update."""
        return 1.0 if self.within == "node" else 1 / self.every, 1 / self.every

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """In the warm-up every replica steps: all have the gradient of all samples."""
        if clock.update < self.warmup_updates:
            return True
        return (
            weight > 0 if self._nodes is None else self._nodes.node_rows(clock.rows_per_replica) > 0
        )

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """In the warm-up over the samples of all replicas, then of a node, or nobody's."""
        if clock.update < self.warmup_updates:
            return WeightedGroup(self.replicas, weight)
        return None if self._nodes is None else self._nodes.weighted_group(clock.rows_per_replica)

    def after_update(self, clock: UpdateClock) -> None:
        """Meet where it is time; in the warm-up equal gradients moved equal parameters."""
        if clock.update >= self.warmup_updates:
            super().after_update(clock)

    def is_due(self, clock: UpdateClock) -> bool:
        """Every `every` updates."""
        return (clock.update + 1) % self.every == 0
