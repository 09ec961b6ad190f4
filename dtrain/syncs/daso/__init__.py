"""DASO: node-local means in every update, and now and then weights that nodes merge when they come.

A run has a blocking warm-up, cycling, and a blocking cool-down. In the blocking phases gradients
are averaged over all replicas, as `every-step` does. While cycling, gradients are averaged inside a
node; every S updates one replica of each node, another one each time, sends its weights, whose mean
over the P nodes comes while B updates go on, and is merged (k = 2 B)::

    x <- (k x + sum over nodes of x_i) / (k + P)

An epoch ends on a blocking mean of weights and optimizer state. After three epochs without progress
S and B are halved; when both are 1 they start again.

Sends, for n replicas on P nodes of g, N parameters: in a blocking phase 2 (n - 1) N per update in
all, 2 (P - 1) N of it between nodes; cycling, 2 (P - 1) N / S per update between nodes, and inside
each 2 (g - 1) N of gradients and (g - 1) N / S of merged weights. Staleness: B updates while
cycling, else 0. One node is the identity: it is `every-step`.

Source: Coquelin et al. 2022, "Accelerating neural network training with distributed asynchronous
and selective optimization (DASO)", arXiv 2104.05588, and its code in heat.

Invariant: what is sent and merged when follows from the clock and the losses of epochs, so neither
segments nor resuming change a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, UpdateClock, require_at_least
from dtrain.syncs.common.local_updates import LocalUpdates
from dtrain.syncs.daso.base import DasoBase, DasoSettings
from dtrain.syncs.daso.heat_compat import HeatDaso
from dtrain.syncs.daso.selective import SelectiveDaso
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass
class DASO(LocalUpdates):
    """Hierarchical, asynchronous, selective. Nodes may be unequal; each counts by its replicas.

    Attributes
    ----------
    warmup_epochs, cooldown_epochs : int, optional
        Of the blocking phases; left out: a tenth of the run, at least 1 and at most 4 (heat's 4).
    max_global_skips : int
        Updates between two parcels (S) when cycling starts.
    skip_reduction_factor : int
        By what S and B are divided on a plateau.
    wait_factor : int
        Which part of S the wait B is when cycling starts; heat calls it ``local_skip_factor``.
    stability_level : float
        By which part of the best a training loss has to fall to be progress.
    local_every : int
        1: gradients are averaged inside a node in every update. More: its replicas step apart, and
        their weights are averaged every so many updates and before they are sent.
    downcast : "none" or "bfloat16"
        How numbers travel between nodes in the blocking phases. Gradients lose nothing that counts;
        heat-compatible weights do: a movement below about 1/500 of a weight is lost.
    heat_compatible : bool
        Go through the phases as heat's code does, batch by batch; see `dtrain.syncs.parts.heat`.
    """

    depends_on_run_length = True
    parameter_copies = 1
    warmup_epochs: int | None = None
    cooldown_epochs: int | None = None
    max_global_skips: int = 8
    skip_reduction_factor: int = 2
    wait_factor: int = 4
    stability_level: float = 0.05
    local_every: int = 1
    downcast: Literal["none", "bfloat16"] = "none"
    heat_compatible: bool = False

    def __post_init__(self) -> None:
        require_at_least("warmup-epochs", self.warmup_epochs or 0, 0)
        require_at_least("cooldown-epochs", self.cooldown_epochs or 0, 0)
        require_at_least("max-global-skips", self.max_global_skips, 1)
        require_at_least("skip-reduction-factor", self.skip_reduction_factor, 2)
        require_at_least("wait-factor", self.wait_factor, 1)
        require_at_least("stability-level", self.stability_level, 0)
        require_at_least("local-every", self.local_every, 1)

    def setup(self, block: SyncTarget, replicas: Comm) -> None:
        """Take the block, and its replicas by node. Collective."""
        super().setup(block, replicas)
        limits = DasoSettings(
            warmup_epochs=self.warmup_epochs,
            cooldown_epochs=self.cooldown_epochs,
            max_global_skips=self.max_global_skips,
            skip_reduction_factor=self.skip_reduction_factor,
            wait_factor=self.wait_factor,
            stability_level=self.stability_level,
            local_every=self.local_every,
            downcast=self.downcast == "bfloat16",
        )
        kind = HeatDaso if self.heat_compatible else SelectiveDaso
        self.variant: DasoBase = kind(block, replicas, limits, self.compressor)

    def communication_cost(self) -> tuple[float, float]:
        """While cycling: one per update inside nodes, and a parcel now and then."""
        return 1 / self.local_every, 1 / self.max_global_skips

    def takes_step(self, weight: float, clock: UpdateClock) -> bool:
        """All replicas step, so that their optimizers count the same."""
        return True

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Over the node, or in a blocking phase over all."""
        return self.variant.gradient_group(weight, clock)

    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Average gradients, where they are narrowed between nodes."""
        self.variant.before_update(gradients, weight, clock)

    def after_update(self, clock: UpdateClock) -> None:
        """Merge, send or meet, where it is time."""
        self.variant.after_update(clock)
        self.in_sync = self.variant.in_sync

    def end_epoch(self, loss: float) -> None:
        """Follow the training loss: skip less where it stands still."""
        self.variant.end_epoch(loss)

    def finish_pending(self) -> None:
        """Land what is under way; it is merged when it is due."""
        if self.variant.in_flight_mean is not None:
            self.variant.in_flight_mean.finish()

    def state(self) -> dict[str, Tensor]:
        """Return counters, and the parcel that is not merged yet."""
        return self.variant.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self.variant.restore(state)
        self.in_sync = self.variant.in_sync
