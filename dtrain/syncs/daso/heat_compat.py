"""Heat: the phases of DASO batch by batch as heat's `optim.DASO` goes through them.

Read in helmholtz-analytics/heat, heat/optim/dp_optimizer.py (commit 0039802). Kept: blocking phases
average weights; cycling starts with (S, L, B) = (4, 1, 1) whatever the maximum; a plateau halves S
and takes one from B; with S = 2 the merge comes one batch late and keeps its weight; a parcel whose
merge would come after the epoch has no effect; node-local gradient means pause for L batches; a
single node merges with its own past. Not kept: what needs CUDA, and a world of equal nodes, which
is refused.

Invariant: at most one parcel is under way between two updates, and `before` is its bridge.

::

    S = 2, B = 1       batch   0      1        2               3        4
                               send   (skip)   send, merge 0   (skip)   send, merge 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.syncs.base import SyncTarget, UpdateClock
from dtrain.syncs.common.compressor import Compressor
from dtrain.syncs.daso.base import DasoBase, DasoSettings
from dtrain.syncs.gradient_reducer import WeightedGroup

HEAT_DEFAULT_LENGTH = 4
"""Epochs of the blocking phases, and S at the start of cycling, where heat's defaults hold."""


@final
class HeatDaso(DasoBase):
    """heat's own order of things. Raises `DtrainError` where nodes have unequal numbers of replicas."""

    def __init__(
        self, block: SyncTarget, replicas: Comm, limits: DasoSettings, carrier: Compressor
    ) -> None:
        super().__init__(block, replicas, limits, allow_single_node=True)
        if not carrier.exact:
            raise ConfigError(
                "todo.key",
                "[sync.inner] heat-compatible sends weights, of which nothing may be lost: leave "
                "it out, or what makes them smaller",
                agreed=True,
            )
        sizes = [len(ranks) for ranks in self.nodes.ranks_by_node]
        if len(set(sizes)) > 1:
            counts = ", ".join(map(str, sizes))
            raise ConfigError(
                "todo.key",
                f"[sync] heat-compatible needs as many replicas on every node, and they have "
                f"{counts}: leave it out, or start equal numbers of ranks",
                agreed=True,
            )
        self.local_skips, self.previous_index, self.averages_in_node = 0, -1, True

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Inside the node, unless that is paused."""
        return self.nodes.weighted_group(clock.rows_per_replica) if self.averages_in_node else None

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Nothing more."""

    def after_update(self, clock: UpdateClock) -> None:
        """Go on by one batch."""
        self.clock, self.in_sync = clock, False
        batch, last = clock.epoch_offset, clock.epoch_offset + clock.epoch_updates_left
        wait = min(self.delay, clock.epoch_updates_left)
        phase = batch % self.skips if self.skips else 0
        if batch == last or phase == 0:
            self._global_sync(clock, batch == last, wait)
        elif (batch + 1) % self.skips == 0:
            self.averages_in_node = True
        elif phase < wait:
            self.averages_in_node = self.averages_in_node or batch + 1 == last
        else:
            self._local_batch(batch, last, phase == wait)

    def end_epoch(self, loss: float) -> None:
        """Set S, L and B of the next epoch."""
        limits, clock = self.settings, self.clock
        assert clock is not None
        warmup, cooldown = (
            HEAT_DEFAULT_LENGTH if asked is None else asked
            for asked in (limits.warmup_epochs, limits.cooldown_epochs)
        )
        epoch = clock.epoch + 1
        if epoch == warmup:
            self.skips, self.local_skips, self.delay = HEAT_DEFAULT_LENGTH, 1, 1
        if epoch < warmup or epoch >= clock.total_epochs - cooldown:
            self.skips = self.local_skips = self.delay = 0
        elif self.plateau.observe(loss):
            self._reduce_skips()

    def _reduce_skips(self) -> None:
        limits = self.settings
        if self.skips > 1:
            self.skips //= limits.skip_reduction_factor
            self.local_skips //= limits.skip_reduction_factor
            self.delay -= 1
            if self.skips:
                self.local_skips, self.delay = max(self.local_skips, 1), max(self.delay, 1)
        elif self.skips == 1:
            self.skips = limits.max_global_skips
            self.local_skips = self.delay = self.skips // limits.wait_factor

    def _global_sync(self, clock: UpdateClock, is_last: bool, delay: int) -> None:
        """Send; merge what was sent before, or where this one blocks take it whole."""
        narrow = torch.bfloat16 if self.settings.downcast and not self.skips else None
        earlier, parcel = self.in_flight_mean, self.send(clock, delay, narrow)
        if is_last or not self.delay:
            for each in filter(None, (earlier, parcel)):
                each.finish()
            own = self.block.trainable_tensors()
            for name, mean in parcel.mean.items():
                own[name].copy_(mean)
            self.broadcast_in_node(self.active_index)
            self.in_sync, self.in_flight_mean, self.previous_index = True, None, -1
        else:
            self._merge_in_flight()
            self.in_flight_mean, self.previous_index = parcel, self.active_index
        self.rotate()
        self.active_index = 0 if is_last else self.active_index

    def _merge_in_flight(self) -> None:
        """Merge the parcel under way, if there is one, and repeat its broadcast in any case."""
        if self.in_flight_mean is not None:
            self.merge(self.in_flight_mean)
            self.in_flight_mean = None
        if self.previous_index >= 0:
            self.broadcast_in_node(self.previous_index)

    def _local_batch(self, batch: int, last_batch: int, merge_due: bool) -> None:
        """A batch that sends nothing: merge what is due, and pause or resume the node's means."""
        if merge_due:
            self._merge_in_flight()
            self.averages_in_node = self.averages_in_node and self.local_skips <= 1
        if self.local_skips == 1 and batch + 1 != last_batch:
            self.averages_in_node = True
            return
        if not self.local_skips or batch % self.local_skips == 0:
            self.averages_in_node = False
        elif (batch + 1) % self.local_skips == 0:
            self.averages_in_node = True
        self.averages_in_node = self.averages_in_node or batch + 1 == last_batch

    def counters(self) -> dict[str, int]:
        """Return the counters by name."""
        told = {
            "local": self.local_skips,
            "before": self.previous_index,
            "near": self.averages_in_node,
        }
        return super().counters() | told

    def restore_counters(self, counters: Mapping[str, int]) -> None:
        """Take back what `numbers` returned."""
        super().restore_counters(counters)
        self.local_skips, self.previous_index = counters["local"], counters["before"]
        self.averages_in_node = bool(counters["near"])
