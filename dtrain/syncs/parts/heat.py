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

from dtrain.comm.comm import Comm
from dtrain.early import Group
from dtrain.errors import Refusal
from dtrain.syncs.parts.carrier import Carrier
from dtrain.syncs.parts.way import Limits, Way
from dtrain.syncs.sync import Clock, Held

PHASE = 4
"""Epochs of the blocking phases, and S at the start of cycling, where heat's defaults hold."""


@final
class Heat(Way):
    """heat's own order of things. Raises `Refusal` where nodes have unequal numbers of replicas."""

    def __init__(self, block: Held, replicas: Comm, limits: Limits, carrier: Carrier) -> None:
        super().__init__(block, replicas, limits, alone=True)
        if not carrier.exact:
            raise Refusal(
                "[sync.inner] heat-compatible sends weights, of which nothing may be lost: leave "
                "it out, or what makes them smaller",
                agreed=True,
            )
        sizes = [len(ranks) for ranks in self.nodes.ranks]
        if len(set(sizes)) > 1:
            counts = ", ".join(map(str, sizes))
            raise Refusal(
                f"[sync] heat-compatible needs as many replicas on every node, and they have "
                f"{counts}: leave it out, or start equal numbers of ranks",
                agreed=True,  # every rank finds the same
            )
        self.local, self.before, self.near = 0, -1, True

    def averages(self, weight: float, clock: Clock) -> Group | None:
        """Inside the node, unless that is paused."""
        return self.nodes.group(clock.rows) if self.near else None

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """Nothing more."""

    def after_update(self, clock: Clock) -> None:
        """Go on by one batch."""
        self.clock, self.equal = clock, False
        batch, last = clock.offset, clock.offset + clock.left
        wait = min(self.wait, clock.left)
        phase = batch % self.skips if self.skips else 0
        if batch == last or phase == 0:
            self._global(clock, batch == last, wait)
        elif (batch + 1) % self.skips == 0:
            self.near = True
        elif phase < wait:
            self.near = self.near or batch + 1 == last
        else:
            self._between(batch, last, phase == wait)

    def end_epoch(self, loss: float) -> None:
        """Set S, L and B of the next epoch."""
        limits, clock = self.limits, self.clock
        assert clock is not None
        warmup, cooldown = (
            PHASE if asked is None else asked
            for asked in (limits.warmup_epochs, limits.cooldown_epochs)
        )
        epoch = clock.epoch + 1
        if epoch == warmup:
            self.skips, self.local, self.wait = PHASE, 1, 1
        if epoch < warmup or epoch >= clock.epochs - cooldown:
            self.skips = self.local = self.wait = 0
        elif self.plateau.fires(loss):
            self._drop()

    def _drop(self) -> None:
        limits = self.limits
        if self.skips > 1:
            self.skips //= limits.skip_reduction_factor
            self.local //= limits.skip_reduction_factor
            self.wait -= 1
            if self.skips:
                self.local, self.wait = max(self.local, 1), max(self.wait, 1)
        elif self.skips == 1:
            self.skips = limits.max_global_skips
            self.local = self.wait = self.skips // limits.wait_factor

    def _global(self, clock: Clock, last: bool, wait: int) -> None:
        """Send; merge what was sent before, or where this one blocks take it whole."""
        narrow = torch.bfloat16 if self.limits.downcast and not self.skips else None
        earlier, parcel = self.parcel, self.send(clock, wait, narrow)
        if last or not self.wait:
            for each in filter(None, (earlier, parcel)):
                each.land()
            own = self.block.values()
            for name, mean in parcel.mean.items():
                own[name].copy_(mean)
            self.share(self.active)
            self.equal, self.parcel, self.before = True, None, -1
        else:
            self._receive()
            self.parcel, self.before = parcel, self.active
        self.rotate()
        self.active = 0 if last else self.active

    def _receive(self) -> None:
        """Merge the parcel under way, if there is one, and repeat its broadcast in any case."""
        if self.parcel is not None:
            self.merge(self.parcel)
            self.parcel = None
        if self.before >= 0:
            self.share(self.before)

    def _between(self, batch: int, last: int, due: bool) -> None:
        """A batch that sends nothing: merge what is due, and pause or resume the node's means."""
        if due:
            self._receive()
            self.near = self.near and self.local <= 1
        if self.local == 1 and batch + 1 != last:
            self.near = True
            return
        if not self.local or batch % self.local == 0:
            self.near = False
        elif (batch + 1) % self.local == 0:
            self.near = True
        self.near = self.near or batch + 1 == last

    def numbers(self) -> dict[str, int]:
        """Return the counters by name."""
        told = {"local": self.local, "before": self.before, "near": self.near}
        return super().numbers() | told

    def count(self, numbers: Mapping[str, int]) -> None:
        """Take back what `numbers` returned."""
        super().count(numbers)
        self.local, self.before = numbers["local"], numbers["before"]
        self.near = bool(numbers["near"])
