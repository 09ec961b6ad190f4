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

from dtrain.comm.comm import Comm
from dtrain.early import Group
from dtrain.syncs.parts.carrier import Carrier
from dtrain.syncs.parts.way import Limits, Way
from dtrain.syncs.sync import Clock, Held

LONGEST = 4
"""Epochs of a blocking phase that the run file leaves open, at most; else a tenth of the run."""


@final
class Selective(Way):
    """Blocking phases average gradients, as `every-step` does; in between parcels fly."""

    def __init__(self, block: Held, replicas: Comm, limits: Limits, carrier: Carrier) -> None:
        super().__init__(block, replicas, limits, carrier)
        self._restart()

    def averages(self, weight: float, clock: Clock) -> Group | None:
        """Over all replicas in the blocking phases, else inside the node."""
        if self.blocks(clock):
            return None if self._narrows else Group(self.replicas, weight)
        return self.nodes.group(clock.rows) if self.limits.local_every == 1 else None

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """Average in the blocking phases, where less is sent between nodes than is added up; note
        from where parcels depart."""
        if self.blocks(clock):
            if self._narrows:
                self._narrowed(gradients, clock)
        elif self.equal:
            self.depart()

    def after_update(self, clock: Clock) -> None:
        """Merge what is due, send what is due, and meet at the end of the epoch."""
        self.clock, every = clock, self.limits.local_every
        if self.blocks(clock) or (every == 1 and not self.bridges):
            return
        self.equal = False
        if every > 1 and (clock.update + 1) % every == 0:
            self.nodes.near.mean_(self.block.values())
        if self.parcel is not None and clock.update >= self.parcel.due:
            self._land()
        if clock.ends_epoch:
            self._meet()
        elif self.bridges and clock.offset % self.skips == 0 and self.wait < clock.left:
            if every > 1:  # what is sent stands for the node
                self.nodes.near.mean_(self.block.values())
            self.parcel = self.send(clock, self.wait)
            self.rotate()

    def end_epoch(self, loss: float) -> None:
        """After three epochs without progress, halve the skips; from 1 start again."""
        assert self.clock is not None
        if self.clock.epoch + 1 < self._warmup(self.clock) or not self.plateau.fires(loss):
            return
        if self.skips > 1:
            factor = self.limits.skip_reduction_factor
            self.skips, self.wait = max(self.skips // factor, 1), max(self.wait // factor, 1)
        else:
            self._restart()

    def blocks(self, clock: Clock) -> bool:
        """Say whether an update is in a blocking phase."""
        cooldown = self._long(self.limits.cooldown_epochs, clock)
        return clock.epoch < self._warmup(clock) or clock.epoch >= clock.epochs - cooldown

    @property
    def _narrows(self) -> bool:
        return self.limits.downcast and bool(self.bridges)

    def _warmup(self, clock: Clock) -> int:
        return self._long(self.limits.warmup_epochs, clock)

    def _long(self, asked: int | None, clock: Clock) -> int:
        scaled = min(max(round(clock.epochs / 10), 1), LONGEST)
        return scaled if asked is None else asked

    def _restart(self) -> None:
        self.skips = self.limits.max_global_skips
        self.wait = max(self.skips // self.limits.wait_factor, 1)

    def _land(self) -> None:
        parcel, self.parcel = self.parcel, None
        assert parcel is not None
        self.merge(parcel)
        self.share(parcel.bridge)

    def _meet(self) -> None:
        """Make all replicas equal: weights, moments, and steps counted."""
        state = self.block.memory().items()
        moments = {name: m for name, m in state if m.dim() and m.is_floating_point()}
        self.replicas.mean_(self.block.values() | moments)
        self.replicas.broadcast_({name: count for name, count in state if not count.dim()})
        self.equal = True

    def _narrowed(self, gradients: Sequence[Tensor], clock: Clock) -> None:
        """Average over all replicas, in bfloat16 between nodes; sums are made in float32."""
        near = self.nodes.group(clock.rows)
        if near is not None:
            near.comm.mean_(self.block.named(gradients), near.weight)
        if (group := self.bridge) is not None:
            narrow = [each.to(torch.bfloat16) for each in gradients]
            group.mean_(narrow, self.nodes.rows(clock.rows) / sum(clock.rows))
            for each, mean in zip(gradients, narrow, strict=True):
                each.copy_(mean)
        self.nodes.near.broadcast_(gradients, self.nodes.root(self.active))
        self.rotate()
