"""The base class of wrappers: a sync around another one, which ``[sync.inner]`` names.

Invariant: every method delegates to the inner sync unless a subclass overrides it. The inner sync
is set up once, with the same block and replicas.

::

    [sync]                      warmup:  every-step for 500 updates, then ...
    name = "warmup"
    updates = 500
    [sync.inner]                         ... terngrad around ...
    name = "terngrad"
    inner = { name = "local-sgd" }             ... local-sgd, with ternary transfers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.block.block import OptimizerStep
from dtrain.comm.communicator import Comm
from dtrain.schema import Table, build_strategy, to_table
from dtrain.syncs.base import (
    LowRankStats,
    Sync,
    SyncTarget,
    SyncTraits,
    UpdateClock,
    add_prefix,
    select_prefix,
)
from dtrain.syncs.common.compressor import NO_COMPRESSION, Compressor
from dtrain.syncs.gradient_reducer import WeightedGroup


def default_inner_table() -> Table:
    """Return the inner sync of a wrapper that names none."""
    return {"name": "every-step"}


@dataclass
class Wrapper(Sync):
    """A sync that delegates to an inner one; a subclass overrides the methods that it changes.

    Attributes
    ----------
    inner : table
        Name and keys of the inner sync.
    inner_sync : Sync
        The inner sync itself.
    """

    inner: Table = field(default_factory=default_inner_table)

    def __post_init__(self) -> None:
        from dtrain.syncs import SYNCS  # imported late, because it imports the wrappers

        table = default_inner_table() | self.inner
        self.inner_sync = build_strategy(SYNCS, table, "sync.inner")
        self.inner = table | to_table(self.inner_sync)  # with all defaults

    def traits(self) -> SyncTraits:
        """Return the traits of the inner sync."""
        return self.inner_sync.traits()

    def setup(
        self, block: SyncTarget, replicas: Comm, compressor: Compressor = NO_COMPRESSION
    ) -> None:
        """Attach this and the inner sync to the same block. Collective over the replicas."""
        super().setup(block, replicas, compressor)
        self.inner_sync.setup(block, replicas, compressor)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        return self.inner_sync.takes_step(weight, clock)

    def communication_cost(self) -> tuple[float, float]:
        return self.inner_sync.communication_cost()

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        return self.inner_sync.gradient_group(weight, clock)

    def averaging_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        return self.inner_sync.averaging_group(weight, clock)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        self.inner_sync.before_update(gradients, weight, clock)

    def before_skipped_update(self, clock: UpdateClock) -> None:
        self.inner_sync.before_skipped_update(clock)

    def lr_factor(self, clock: UpdateClock) -> float:
        return self.inner_sync.lr_factor(clock)

    def optimizer_step(self, clock: UpdateClock) -> OptimizerStep | None:
        return self.inner_sync.optimizer_step(clock)

    def after_update(self, clock: UpdateClock) -> None:
        self.inner_sync.after_update(clock)
        self.in_sync = self.inner_sync.in_sync

    def end_epoch(self, loss: float) -> None:
        self.inner_sync.end_epoch(loss)

    def finish_pending(self) -> None:
        self.inner_sync.finish_pending()

    def evaluation_weights(self) -> dict[str, Tensor]:
        return self.inner_sync.evaluation_weights()

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """Return the statistics of the inner sync, which count elements before compression."""
        return self.inner_sync.low_rank_stats()

    def state(self) -> dict[str, Tensor]:
        """Return the state of the inner sync under ``inner/``."""
        return add_prefix("inner/", self.inner_sync.state())

    def restore_shapes(self, state: Mapping[str, Tensor]) -> None:
        self.inner_sync.restore_shapes(select_prefix(state, "inner/"))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the state of the inner sync."""
        self.inner_sync.restore(select_prefix(state, "inner/"))
        self.in_sync = self.inner_sync.in_sync
