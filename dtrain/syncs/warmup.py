"""Warm-up: `every-step` for some updates, then another sync.

Some syncs need weights or an optimizer state after some training: PowerSGD's paper and torch's hook
start so. During the warm-up it sends what `every-step` does, afterwards what the inner sync does.

Invariant: replicas are equal, optimizers included, when the inner sync starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from dtrain.block.block import OptimizerStep
from dtrain.syncs.base import SyncTraits, UpdateClock, require_at_least
from dtrain.syncs.common.wrapper import Wrapper
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass
class Warmup(Wrapper):
    """`every-step` first, then the inner sync.

    Attributes
    ----------
    updates : int, optional
        Updates before the inner sync starts; left out: a tenth of the run.
    """

    updates: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("updates", self.updates, 0)

    def traits(self) -> SyncTraits:
        """Return the traits of the inner sync; the optimizer steps in the warm-up."""
        inner = super().traits()
        return replace(
            inner,
            depends_on_run_length=inner.depends_on_run_length or self.updates is None,
            keeps_no_optimizer_state=False,
        )

    def in_warmup(self, clock: UpdateClock) -> bool:
        """Return whether an update is before the start of the inner sync."""
        return clock.update < (clock.total_updates // 10 if self.updates is None else self.updates)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """Return True in the warm-up: all replicas have the gradient of all samples."""
        return self.in_warmup(clock) or super().takes_step(weight, clock)

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return all replicas in the warm-up."""
        if self.in_warmup(clock):
            return WeightedGroup(self.replicas, weight)
        return super().gradient_group(weight, clock)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Pass the gradients to the inner sync after the warm-up."""
        if not self.in_warmup(clock):
            super().before_update(gradients, weight, clock)

    def before_skipped_update(self, clock: UpdateClock) -> None:
        """Call the inner sync after the warm-up."""
        if not self.in_warmup(clock):
            super().before_skipped_update(clock)

    def lr_factor(self, clock: UpdateClock) -> float:
        """Return 1 in the warm-up."""
        return 1.0 if self.in_warmup(clock) else super().lr_factor(clock)

    def optimizer_step(self, clock: UpdateClock) -> OptimizerStep | None:
        """Return None in the warm-up, which keeps the optimizer's step."""
        return None if self.in_warmup(clock) else super().optimizer_step(clock)

    def after_update(self, clock: UpdateClock) -> None:
        """Call the inner sync after the warm-up."""
        if not self.in_warmup(clock):
            super().after_update(clock)
