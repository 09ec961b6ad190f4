"""Selective: the phases of DASO as its paper describes them, without the defects of heat's code.

Invariant: replicas are equal, optimizer state included, in both blocking phases and at the end of
every epoch; a parcel is merged with the weight of the delay that it really had.

::

    update      0    1    2    3    4    5    6    7  | end of the epoch     S = 4, B = 2
                send      merge     send      merge   | mean of weights and optimizer state
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, UpdateClock
from dtrain.syncs.common.compressor import Compressor
from dtrain.syncs.daso.base import DasoBase, DasoSettings
from dtrain.syncs.gradient_reducer import WeightedGroup

MAX_BLOCKING_EPOCHS = 4
"""Epochs of a blocking phase that the run file leaves open, at most; else a tenth of the run."""


@final
class SelectiveDaso(DasoBase):
    """Blocking phases average gradients, as `every-step` does; in between parcels fly."""

    def __init__(
        self, block: SyncTarget, replicas: Comm, limits: DasoSettings, carrier: Compressor
    ) -> None:
        super().__init__(block, replicas, limits, carrier)
        self._reset_skips()

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Over all replicas in the blocking phases, else inside the node."""
        if self.is_blocking(clock):
            return None if self._downcasts else WeightedGroup(self.replicas, weight)
        return (
            self.nodes.weighted_group(clock.rows_per_replica)
            if self.settings.local_every == 1
            else None
        )

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Average in the blocking phases, where less is sent between nodes than is added up; note
        from where parcels depart."""
        if self.is_blocking(clock):
            if self._downcasts:
                self._average_downcast(gradients, clock)
        elif self.in_sync:
            self.save_base_weights()

    def after_update(self, clock: UpdateClock) -> None:
        """Merge what is due, send what is due, and meet at the end of the epoch."""
        self.clock, every = clock, self.settings.local_every
        if self.is_blocking(clock) or (every == 1 and not self.inter_node_groups):
            return
        self.in_sync = False
        if every > 1 and (clock.update + 1) % every == 0:
            self.nodes.node_group.mean_(self.block.trainable_tensors())
        if self.in_flight_mean is not None and clock.update >= self.in_flight_mean.due_update:
            self._merge_in_flight()
        if clock.ends_epoch:
            self._synchronise()
        elif (
            self.inter_node_groups
            and clock.epoch_offset % self.skips == 0
            and self.delay < clock.epoch_updates_left
        ):
            if every > 1:  # what is sent stands for the node
                self.nodes.node_group.mean_(self.block.trainable_tensors())
            self.in_flight_mean = self.send(clock, self.delay)
            self.rotate()

    def end_epoch(self, loss: float) -> None:
        """After three epochs without progress, halve the skips; from 1 start again."""
        assert self.clock is not None
        if self.clock.epoch + 1 < self._warmup_epochs(self.clock) or not self.plateau.observe(loss):
            return
        if self.skips > 1:
            factor = self.settings.skip_reduction_factor
            self.skips, self.delay = max(self.skips // factor, 1), max(self.delay // factor, 1)
        else:
            self._reset_skips()

    def is_blocking(self, clock: UpdateClock) -> bool:
        """Say whether an update is in a blocking phase."""
        cooldown = self._blocking_epochs(self.settings.cooldown_epochs, clock)
        return (
            clock.epoch < self._warmup_epochs(clock) or clock.epoch >= clock.total_epochs - cooldown
        )

    @property
    def _downcasts(self) -> bool:
        return self.settings.downcast and bool(self.inter_node_groups)

    def _warmup_epochs(self, clock: UpdateClock) -> int:
        return self._blocking_epochs(self.settings.warmup_epochs, clock)

    def _blocking_epochs(self, setting: int | None, clock: UpdateClock) -> int:
        scaled = min(max(round(clock.total_epochs / 10), 1), MAX_BLOCKING_EPOCHS)
        return scaled if setting is None else setting

    def _reset_skips(self) -> None:
        self.skips = self.settings.max_global_skips
        self.delay = max(self.skips // self.settings.wait_factor, 1)

    def _merge_in_flight(self) -> None:
        parcel, self.in_flight_mean = self.in_flight_mean, None
        assert parcel is not None
        self.merge(parcel)
        self.broadcast_in_node(parcel.group_index)

    def _synchronise(self) -> None:
        """Make all replicas equal: weights, moments, and steps counted."""
        state = self.block.optimizer_state().items()
        moments = {name: m for name, m in state if m.dim() and m.is_floating_point()}
        self.replicas.mean_(self.block.trainable_tensors() | moments)
        self.replicas.broadcast_({name: count for name, count in state if not count.dim()})
        self.in_sync = True

    def _average_downcast(self, gradients: Sequence[Tensor], clock: UpdateClock) -> None:
        """Average over all replicas, in bfloat16 between nodes; sums are made in float32."""
        near = self.nodes.weighted_group(clock.rows_per_replica)
        if near is not None:
            near.comm.mean_(self.block.name_gradients(gradients), near.weight)
        if (group := self.inter_node_group) is not None:
            narrow = [each.to(torch.bfloat16) for each in gradients]
            group.mean_(
                narrow, self.nodes.node_rows(clock.rows_per_replica) / sum(clock.rows_per_replica)
            )
            for each, mean in zip(gradients, narrow, strict=True):
                each.copy_(mean)
        self.nodes.node_group.broadcast_(gradients, self.nodes.root(self.active_index))
        self.rotate()
