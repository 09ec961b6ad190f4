"""Warm-up: gradients averaged in every update at first, then another sync.

For syncs that need weights, or an optimizer, that have settled: PowerSGD's paper and torch's hook
begin so. Sends as `every-step` until then, afterwards as the inner sync.

Invariant: replicas are equal, optimizers included, when the inner sync begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dtrain.block.block import OptimizerStep
from dtrain.syncs.base import UpdateClock, require_at_least
from dtrain.syncs.common.wrapper import Wrapper
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass
class Warmup(Wrapper):
    """`every-step`, then what ``[sync.inner]`` names.

    Attributes
    ----------
    updates : int, optional
        Updates before the inner sync begins; left out: a tenth of the run.
    """

    updates: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keeps_no_optimizer_state = False
        self.depends_on_run_length = self.depends_on_run_length or self.updates is None
        require_at_least("updates", self.updates, 0)

    def in_warmup(self, clock: UpdateClock) -> bool:
        """Say whether the inner sync waits yet."""
        return clock.update < (clock.total_updates // 10 if self.updates is None else self.updates)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """At first every replica steps: all have the gradient of all samples."""
        return self.in_warmup(clock) or super().takes_step(weight, clock)

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """At first over all replicas."""
        if self.in_warmup(clock):
            return WeightedGroup(self.replicas, weight)
        return super().gradient_group(weight, clock)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Hand the gradients on, once it is time."""
        if not self.in_warmup(clock):
            super().before_update(gradients, weight, clock)

    def lr_factor(self, clock: UpdateClock) -> float:
        """At first the schedule's own."""
        return 1.0 if self.in_warmup(clock) else super().lr_factor(clock)

    def optimizer_step(self, clock: UpdateClock) -> OptimizerStep | None:
        """At first the optimizer's own."""
        return None if self.in_warmup(clock) else super().optimizer_step(clock)

    def after_update(self, clock: UpdateClock) -> None:
        """Let the inner sync agree, once it is time."""
        if not self.in_warmup(clock):
            super().after_update(clock)
