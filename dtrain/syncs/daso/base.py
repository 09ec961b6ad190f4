"""Way: one way of going through the phases of DASO; and what both of them do.

Invariant: a parcel is sent and merged by one replica of each node, its bridge, and all replicas
know of it: those that are not on the bridge are given what it merged.

::

    bridge 0 of nodes {0 1} and {2 3}        sent at t, merged B updates later

    rank 0   copy --.                 .-- merge --> broadcast to 1
    rank 1          |---- mean -------|       x = (k x + P mean) / (k + P)
    rank 2   copy --'                 '-- merge --> broadcast to 3
    rank 3
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm
from dtrain.syncs.base import SyncTarget, UpdateClock, select_prefix
from dtrain.syncs.common.compressor import NO_COMPRESSION, Completion, Compressor
from dtrain.syncs.common.node_groups import NodeGroups, inter_node_groups
from dtrain.syncs.gradient_reducer import WeightedGroup


@final
@dataclass(frozen=True)
class DasoSettings:
    """The numbers of a run file that both ways follow; `DASO` says what they are."""

    warmup_epochs: int | None
    cooldown_epochs: int | None
    max_global_skips: int
    skip_reduction_factor: int
    wait_factor: int
    stability_level: float
    local_every: int
    downcast: bool


@final
@dataclass
class InFlightMean:
    """Weights under way on a bridge.

    Attributes
    ----------
    bridge : int
        Its number.
    wait : int
        Updates from sending to merging (B).
    due : int
        The update after which it is merged.
    mean : dict of str to Tensor
        The nodes' weights, or what they moved by, averaged once `land` returns; empty where I am
        not on the bridge.
    """

    group_index: int
    delay: int
    due_update: int
    mean: dict[str, Tensor] = field(default_factory=dict)
    completion: Completion | None = None

    def finish(self) -> None:
        """Wait until the mean is here."""
        if self.completion is not None:
            self.completion()
            self.completion = None


class DasoBase(ABC):
    """What DASO does around an update, and how often.

    Attributes
    ----------
    nodes : Nodes
        The replicas by node.
    bridges : list of (Comm or None)
        What parcels cross; empty with one node, unless `alone`.
    equal : bool
        Whether all replicas hold the same parameters.
    skips, wait : int
        Updates between two parcels (S; 0: every update is blocking), and from sending one to
        merging it (B).
    """

    def __init__(
        self,
        block: SyncTarget,
        replicas: Comm,
        settings: DasoSettings,
        compressor: Compressor = NO_COMPRESSION,
        allow_single_node: bool = False,
    ) -> None:
        self.block, self.replicas, self.settings = block, replicas, settings
        self.compressor = compressor
        self.base_weights: dict[str, Tensor] = {}
        self.nodes = NodeGroups(replicas)
        self.inter_node_groups = (
            inter_node_groups(replicas, self.nodes)
            if allow_single_node or len(self.nodes.ranks_by_node) > 1
            else []
        )
        self.plateau = PlateauDetector(settings.stability_level)
        self.in_flight_mean: InFlightMean | None = None
        self.clock: UpdateClock | None = None
        self.in_sync = True
        self.active_index = self.skips = self.delay = 0

    @abstractmethod
    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup | None:
        """Return over whom gradients are averaged."""

    @abstractmethod
    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: UpdateClock) -> None:
        """Change the gradients in place."""

    @abstractmethod
    def after_update(self, clock: UpdateClock) -> None:
        """Change the parameters in place."""

    @abstractmethod
    def end_epoch(self, loss: float) -> None:
        """Set the skips of the next epoch."""

    def send(
        self, clock: UpdateClock, delay: int, dtype: torch.dtype | None = None
    ) -> InFlightMean:
        """Start the mean of the weights on the active bridge, each node by its replicas."""
        parcel, group = (
            InFlightMean(self.active_index, delay, clock.update + delay),
            self.inter_node_group,
        )
        if group is not None:
            for name, own in self.block.trainable_tensors().items():
                gone = (
                    own - self.base_weights[name]
                    if self.base_weights
                    else own.to(dtype or own.dtype, copy=True)
                )
                parcel.mean[name] = gone
            carried = parcel.mean, self.nodes.replica_fraction, clock.update
            parcel.completion = self.compressor.begin(group, *carried)
        return parcel

    def save_base_weights(self) -> None:
        """Keep the weights that all nodes hold now, where what moves from here is to travel."""
        if not self.compressor.exact:
            self.base_weights = {
                name: own.clone() for name, own in self.block.trainable_tensors().items()
            }

    def merge(self, in_flight_mean: InFlightMean) -> None:
        """Merge a parcel into the weights of its bridge; then see `share`."""
        in_flight_mean.finish()
        nodes, local = len(self.nodes.ranks_by_node), 2 * in_flight_mean.delay or 1
        own = self.block.trainable_tensors()
        for name, mean in in_flight_mean.mean.items():
            there = mean + self.base_weights[name] if self.base_weights else mean
            own[name].mul_(local / (local + nodes)).add_(there, alpha=nodes / (local + nodes))

    def broadcast_in_node(self, group_index: int) -> None:
        """Give all replicas of the node the weights of the one on a bridge."""
        self.nodes.node_group.broadcast_(
            self.block.trainable_tensors(), self.nodes.root(group_index)
        )

    @property
    def inter_node_group(self) -> Comm | None:
        """The active bridge, where I am on it."""
        return self.inter_node_groups[self.active_index]

    def rotate(self) -> None:
        """Make the next bridge the active one."""
        self.active_index = (self.active_index + 1) % len(self.inter_node_groups)

    # ---- what survives a restart

    def counters(self) -> dict[str, int]:
        """Return the counters by name."""
        told = {
            "equal": self.in_sync,
            "active": self.active_index,
            "skips": self.skips,
            "wait": self.delay,
        }
        return {**told, "bad": self.plateau.bad_epochs}

    def restore_counters(self, counters: Mapping[str, int]) -> None:
        """Take back what `numbers` returned."""
        self.in_sync, self.plateau.bad_epochs = bool(counters["equal"]), counters["bad"]
        self.active_index, self.skips, self.delay = (
            counters[key] for key in ("active", "skips", "wait")
        )

    def state(self) -> dict[str, Tensor]:
        """Return the counters, the best loss, and the parcel that has landed but is not merged."""
        told = {name: torch.tensor(int(each)) for name, each in self.counters().items()}
        told["best"] = torch.tensor(self.plateau.best, dtype=torch.float64)
        if (parcel := self.in_flight_mean) is not None:
            told["parcel"] = torch.tensor([parcel.group_index, parcel.delay, parcel.due_update])
            told |= {f"stale/{name}": each for name, each in parcel.mean.items()}
        return told | {f"base/{name}": each for name, each in self.base_weights.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self.restore_counters({name: int(state[name]) for name in self.counters()})
        self.plateau.best = float(state["best"])
        if "parcel" in state:
            mean = {name: each.clone() for name, each in select_prefix(state, "stale/").items()}
            bridge, wait, due = map(int, state["parcel"].tolist())
            self.in_flight_mean = InFlightMean(bridge, wait, due, mean)
        self.base_weights = {
            name: each.clone() for name, each in select_prefix(state, "base/").items()
        }


@final
@dataclass
class PlateauDetector:
    """Fires on the third epoch in a row that does not improve on the best.

    Attributes
    ----------
    level : float
        By which part of the best a loss has to be lower to be an improvement.
    best : float
        The last loss that was one.
    bad : int
        Epochs since then, or since it fired.
    """

    threshold: float
    best: float = inf
    bad_epochs: int = 0

    def observe(self, loss: float) -> bool:
        """Hear the loss of an epoch; say whether the plateau is reached."""
        less = 1 - self.threshold if self.best >= 0 else 1 + self.threshold
        if loss < self.best * less:
            self.best, self.bad_epochs = loss, 0
            return False
        self.bad_epochs += 1
        if self.bad_epochs <= 2:
            return False
        self.bad_epochs = 0
        return True
