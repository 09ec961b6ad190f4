"""Local SGD: replicas take `every` local optimizer steps, then average their parameters.

With `warmup_updates` or ``within = "node"`` it is post-local SGD. Each replica sends
2 (n - 1) / (n every) times the block's parameters per update, of which 2 (m - 1) / (m every) per
node between m nodes. During the warm-up it sends the gradients of every update, as `every-step`
does. With ``within = "node"`` it sends also 2 (g - 1) / g times the gradients per update inside a
node of g replicas. Staleness 0. One replica is the identity.

Source: Stich 2019, "Local SGD Converges Fast and Communicates Little"; Lin et al. 2020, "Don't Use
Large Mini-Batches, Use Local SGD" (post-local SGD).

Invariant: the number of the update alone, counted from the start of the run, decides what is
averaged, so neither segments nor resuming move a synchronisation.

::

    every = 3, warmup_updates = 2        g gradients, p parameters averaged

    update      0   1 | 2   3   4   5   6   7   8
    averaged    g   g | p           p           p       if (update + 1) % every = 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, UpdateClock, require_at_least
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.common.local_updates import PeriodicSync
from dtrain.syncs.common.node_groups import NodeGroups
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass
class LocalSGD(PeriodicSync):
    """Periodic averaging of parameters; optimizer state stays local.

    The mean is over replicas, not over samples: a replica with fewer samples counts as much. In an
    update without samples a replica skips its step, but takes part in the mean. During the warm-up
    gradients are averaged over samples and all replicas step, so they end it with equal momentum.

    Attributes
    ----------
    every : int
        Updates between two means of the parameters (H).
    warmup_updates : int
        Updates at the start in which gradients are averaged instead.
    within : "replica" or "node"
        The unit that takes local steps: each replica, or each node, whose replicas then average
        their gradients in every update.
    """

    every: int = 8
    warmup_updates: int = 0
    within: Literal["replica", "node"] = "replica"

    def __post_init__(self) -> None:
        require_at_least("every", self.every, 1)
        require_at_least("warmup-updates", self.warmup_updates, 0)

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach the sync to a block. Collective over the replicas."""
        super().setup(block, replicas, compressor)
        self._nodes = NodeGroups(replicas) if self.within == "node" else None

    def communication_cost(self) -> tuple[float, float]:
        """Return one mean per round, and one per update inside nodes that step together."""
        return 1.0 if self.within == "node" else 1 / self.every, 1 / self.every

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Return whether the replica or its node has samples; in the warm-up True."""
        if clock.update < self.warmup_updates:
            return True
        if self._nodes is None:
            return weight > 0
        return self._nodes.node_rows(clock.rows_per_replica) > 0

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return all replicas in the warm-up, then those of a node, or none."""
        if clock.update < self.warmup_updates:
            return WeightedGroup(self.replicas, weight)
        return None if self._nodes is None else self._nodes.weighted_group(clock.rows_per_replica)

    def after_update(self, clock: UpdateClock) -> None:
        """Average the parameters at the end of a round. Collective over the replicas.

        In the warm-up equal gradients move equal parameters, which are not averaged.
        """
        if clock.update >= self.warmup_updates:
            super().after_update(clock)

    def is_due(self, clock: UpdateClock) -> bool:
        """Synchronise every `every` updates."""
        return (clock.update + 1) % self.every == 0
