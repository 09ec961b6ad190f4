"""DASO in the order of operations of heat's `optim.DASO`: a reference, on the parts of ours.

Read in helmholtz-analytics/heat, heat/optim/dp_optimizer.py (commit 0039802). It differs from
`dtrain.syncs.daso` where heat differs from the paper:

- blocking phases average weights instead of gradients;
- cycling starts with (S, L, B) = (4, 1, 1) whatever the maximum, and with a warm-up of 0 epochs S
  stays 0;
- a plateau halves S and takes one from B; then with S = 2 the merge comes one batch late and keeps
  its weight;
- a mean whose merge would come after the end of the epoch has no effect;
- node-local means of gradients pause for L batches;
- momentum differs between nodes in the cool-down;
- a single node merges with its own past.

Left out: CUDA, downcasting and restarts. Nodes have equal numbers of replicas.

Invariant: at most one mean is in flight between two updates, and `previous_index` is its group.

::

    S = 2, B = 1       batch   0      1        2               3        4
                               send   (skip)   send, merge 0   (skip)   send, merge 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, UpdateClock
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.common.local_updates import LocalUpdates
from dtrain.syncs.common.node_groups import NodeGroups, inter_node_groups
from dtrain.syncs.daso.async_merge import AsyncMean
from dtrain.syncs.daso.plateau import PlateauDetector
from dtrain.syncs.gradient_reducer import WeightedGroup

FIRST_SKIPS = 4
"""S at the start of cycling."""


@final
@dataclass
class HeatDASO(LocalUpdates):
    """heat's DASO; its keys are those of `dtrain.syncs.daso.DASO`."""

    warmup_epochs: int = 4
    cooldown_epochs: int = 4
    max_global_skips: int = 8
    skip_reduction_factor: int = 2
    wait_factor: int = 4
    stability_level: float = 0.05

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        super().setup(block, replicas, compressor)
        self.nodes = NodeGroups(replicas)
        assert len({len(ranks) for ranks in self.nodes.topology.nodes}) == 1
        groups = inter_node_groups(replicas, self.nodes)
        self.async_mean = AsyncMean(block, self.nodes, groups, compressor)
        self.plateau = PlateauDetector(self.stability_level)
        self.skips = self.local_skips = self.delay = 0
        self.previous_index = -1
        self.averages_in_node = True

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return the replicas of the node, unless their means pause."""
        return self.nodes.weighted_group(clock.rows_per_replica) if self.averages_in_node else None

    def after_update(self, clock: UpdateClock) -> None:
        self.clock, self.in_sync = clock, False
        batch, last = clock.epoch_offset, clock.epoch_offset + clock.epoch_updates_left
        delay = min(self.delay, clock.epoch_updates_left)
        phase = batch % self.skips if self.skips else 0
        if batch == last or phase == 0:
            self.global_sync(clock, batch == last, delay)
        elif (batch + 1) % self.skips == 0:
            self.averages_in_node = True
        elif phase < delay:
            self.averages_in_node = self.averages_in_node or batch + 1 == last
        else:
            self.local_batch(batch, last, phase == delay)

    def end_epoch(self, loss: float) -> None:
        """Set S, L and B of the next epoch."""
        clock = self.clock
        epoch = clock.epoch + 1
        if epoch == self.warmup_epochs:
            self.skips, self.local_skips, self.delay = FIRST_SKIPS, 1, 1
        if epoch < self.warmup_epochs or epoch >= clock.total_epochs - self.cooldown_epochs:
            self.skips = self.local_skips = self.delay = 0
        elif self.plateau.observe(loss):
            self.reduce_skips()

    def reduce_skips(self) -> None:
        if self.skips > 1:
            self.skips //= self.skip_reduction_factor
            self.local_skips //= self.skip_reduction_factor
            self.delay -= 1
            if self.skips:
                self.local_skips, self.delay = max(self.local_skips, 1), max(self.delay, 1)
        elif self.skips == 1:
            self.skips = self.max_global_skips
            self.local_skips = self.delay = self.skips // self.wait_factor

    def global_sync(self, clock: UpdateClock, is_last: bool, delay: int) -> None:
        """Send; merge the mean in flight, or where this one blocks take it whole."""
        async_mean = self.async_mean
        earlier, sent = async_mean.in_flight, async_mean.send(clock, delay)
        if is_last or not self.delay:
            for mean in filter(None, (earlier, sent)):
                mean.finish()
            weights = self.block.trainable_tensors()
            for name, tensor in sent.mean.items():
                weights[name].copy_(tensor)
            async_mean.broadcast_in_node(async_mean.active_index)
            self.in_sync, async_mean.in_flight, self.previous_index = True, None, -1
        else:
            self.merge_in_flight()
            async_mean.in_flight, self.previous_index = sent, async_mean.active_index
        async_mean.rotate()
        if is_last:
            async_mean.active_index = 0

    def merge_in_flight(self) -> None:
        """Merge the mean in flight; without one, repeat the broadcast of the last."""
        async_mean = self.async_mean
        if async_mean.in_flight is not None:
            async_mean.merge(async_mean.in_flight)
            async_mean.in_flight = None
        elif self.previous_index >= 0:
            async_mean.broadcast_in_node(self.previous_index)

    def local_batch(self, batch: int, last_batch: int, merge_due: bool) -> None:
        """Merge where it is due, and pause or resume the node's means."""
        if merge_due:
            self.merge_in_flight()
            self.averages_in_node = self.averages_in_node and self.local_skips <= 1
        if self.local_skips == 1 and batch + 1 != last_batch:
            self.averages_in_node = True
            return
        if not self.local_skips or batch % self.local_skips == 0:
            self.averages_in_node = False
        elif (batch + 1) % self.local_skips == 0:
            self.averages_in_node = True
        self.averages_in_node = self.averages_in_node or batch + 1 == last_batch
