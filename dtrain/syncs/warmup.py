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

from dtrain.block import Rule
from dtrain.early import Group
from dtrain.syncs.parts.wrapper import Wrapper
from dtrain.syncs.sync import Clock, least


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
        self.idles = False
        self.horizon = self.horizon or self.updates is None
        least("updates", self.updates, 0)

    def warms(self, clock: Clock) -> bool:
        """Say whether the inner sync waits yet."""
        return clock.update < (clock.total // 10 if self.updates is None else self.updates)

    def steps(self, weight: float, clock: Clock) -> bool:
        """At first every replica steps: all have the gradient of all samples."""
        return self.warms(clock) or super().steps(weight, clock)

    def averages(self, weight: float, clock: Clock) -> Group | None:
        """At first over all replicas."""
        if self.warms(clock):
            return Group(self.replicas, weight)
        return super().averages(weight, clock)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """Hand the gradients on, once it is time."""
        if not self.warms(clock):
            super().before_update(gradients, weight, clock)

    def rate(self, clock: Clock) -> float:
        """At first the schedule's own."""
        return 1.0 if self.warms(clock) else super().rate(clock)

    def rule(self, clock: Clock) -> Rule | None:
        """At first the optimizer's own."""
        return None if self.warms(clock) else super().rule(clock)

    def after_update(self, clock: Clock) -> None:
        """Let the inner sync agree, once it is time."""
        if not self.warms(clock):
            super().after_update(clock)
