"""Wrapper: a sync around another, which ``[sync.inner]`` names.

Invariant: what a wrapper does not say the inner sync says; it is opened once, with the same block
and replicas, and hears of every update.

::

    [sync]                      warmup:  every-step for 500 updates, then ...
    name = "warmup"
    updates = 500
    [sync.inner]                         ... terngrad around ...
    name = "terngrad"
    inner = { name = "local-sgd" }             ... local-sgd: what it sends is ternary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.block.block import OptimizerStep
from dtrain.comm.communicator import Comm
from dtrain.schema import Table, build_strategy, to_table
from dtrain.syncs.base import LowRankStats, Sync, SyncTarget, UpdateClock, select_prefix
from dtrain.syncs.common.compressor import Compressor
from dtrain.syncs.gradient_reducer import WeightedGroup


def default_inner_table() -> Table:
    """Return the inner sync of those that name none."""
    return {"name": "every-step"}


@dataclass
class Wrapper(Sync):
    """Hands everything to the inner sync; a subclass overrides what it changes.

    Attributes
    ----------
    inner : table
        Name and keys of the inner sync.
    """

    inner: Table = field(default_factory=default_inner_table)

    def __post_init__(self) -> None:
        from dtrain.syncs import SYNCS  # which has the wrappers

        self.inner_sync = build_strategy(SYNCS, default_inner_table() | self.inner, "sync.inner")
        self.inner = (
            default_inner_table() | self.inner | to_table(self.inner_sync)
        )  # defaults spelled out
        self.replicas_diverge, self.depends_on_run_length = (
            self.inner_sync.replicas_diverge,
            self.inner_sync.depends_on_run_length,
        )
        self.parameter_copies, self.lossy = self.inner_sync.parameter_copies, self.inner_sync.lossy
        self.replaces_optimizer, self.keeps_no_optimizer_state = (
            self.inner_sync.replaces_optimizer,
            self.inner_sync.keeps_no_optimizer_state,
        )
        self.reparametrises, self.compressible = (
            self.inner_sync.reparametrises,
            self.inner_sync.compressible,
        )

    @property
    def in_sync(self) -> bool:  # type: ignore[override]
        """What the inner sync says."""
        return self.inner_sync.in_sync

    def setup(self, block: SyncTarget, replicas: Comm) -> None:
        """Open the inner sync with the same block and replicas."""
        super().setup(block, replicas)
        self.inner_sync.setup(block, replicas)

    def set_compressor(self, compressor: Compressor) -> None:
        """Hand the carrier on to who sends."""
        self.compressor = compressor
        self.inner_sync.set_compressor(compressor)

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """As the inner sync."""
        return self.inner_sync.takes_step(weight, clock)

    def communication_cost(self) -> tuple[float, float]:
        """As the inner sync."""
        return self.inner_sync.communication_cost()

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """As the inner sync."""
        return self.inner_sync.gradient_group(weight, clock)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Hand the gradients on."""
        self.inner_sync.before_update(gradients, weight, clock)

    def lr_factor(self, clock: UpdateClock) -> float:
        """As the inner sync."""
        return self.inner_sync.lr_factor(clock)

    def optimizer_step(self, clock: UpdateClock) -> OptimizerStep | None:
        """As the inner sync."""
        return self.inner_sync.optimizer_step(clock)

    def after_update(self, clock: UpdateClock) -> None:
        """Let the inner sync agree."""
        self.inner_sync.after_update(clock)

    def end_epoch(self, loss: float) -> None:
        """Hand the loss on."""
        self.inner_sync.end_epoch(loss)

    def finish_pending(self) -> None:
        """Let the inner sync land what is in flight."""
        self.inner_sync.finish_pending()

    def evaluation_weights(self) -> dict[str, Tensor]:
        """Show what the inner sync shows."""
        return self.inner_sync.evaluation_weights()

    def low_rank_stats(self) -> dict[str, LowRankStats]:
        """As the inner sync; what it sends is counted before it is made smaller."""
        return self.inner_sync.low_rank_stats()

    def state(self) -> dict[str, Tensor]:
        """Return the inner sync's state."""
        return {f"inner/{name}": each for name, each in self.inner_sync.state().items()}

    def restore_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Let the inner sync give the block its shapes."""
        self.inner_sync.restore_shapes(select_prefix(state, "inner/"))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self.inner_sync.restore(select_prefix(state, "inner/"))
