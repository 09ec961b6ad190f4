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
from typing import final

import torch
from torch import Tensor

from dtrain.comm.comm import Comm
from dtrain.early import Group
from dtrain.syncs.parts.carrier import EXACT, Carrier, Land
from dtrain.syncs.parts.nodes import Nodes, bridged
from dtrain.syncs.parts.plateau import Plateau
from dtrain.syncs.sync import Clock, Held, under


@final
@dataclass(frozen=True)
class Limits:
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
class Parcel:
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

    bridge: int
    wait: int
    due: int
    mean: dict[str, Tensor] = field(default_factory=dict)
    coming: Land | None = None

    def land(self) -> None:
        """Wait until the mean is here."""
        if self.coming is not None:
            self.coming()
            self.coming = None


class Way(ABC):
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
        block: Held,
        replicas: Comm,
        limits: Limits,
        carrier: Carrier = EXACT,
        alone: bool = False,
    ) -> None:
        self.block, self.replicas, self.limits = block, replicas, limits
        self.carrier = carrier
        self.base: dict[str, Tensor] = {}
        self.nodes = Nodes(replicas)
        self.bridges = bridged(replicas, self.nodes) if alone or len(self.nodes.ranks) > 1 else []
        self.plateau = Plateau(limits.stability_level)
        self.parcel: Parcel | None = None
        self.clock: Clock | None = None
        self.equal = True
        self.active = self.skips = self.wait = 0

    @abstractmethod
    def averages(self, weight: float, clock: Clock) -> Group | None:
        """Return over whom gradients are averaged."""

    @abstractmethod
    def before_update(self, gradients: Sequence[Tensor], weight: float, clock: Clock) -> None:
        """Change the gradients in place."""

    @abstractmethod
    def after_update(self, clock: Clock) -> None:
        """Change the parameters in place."""

    @abstractmethod
    def end_epoch(self, loss: float) -> None:
        """Set the skips of the next epoch."""

    def send(self, clock: Clock, wait: int, dtype: torch.dtype | None = None) -> Parcel:
        """Start the mean of the weights on the active bridge, each node by its replicas."""
        parcel, group = Parcel(self.active, wait, clock.update + wait), self.bridge
        if group is not None:
            for name, own in self.block.values().items():
                gone = own - self.base[name] if self.base else own.to(dtype or own.dtype, copy=True)
                parcel.mean[name] = gone
            carried = parcel.mean, self.nodes.share, clock.update
            parcel.coming = self.carrier.begin(group, *carried)
        return parcel

    def depart(self) -> None:
        """Keep the weights that all nodes hold now, where what moves from here is to travel."""
        if not self.carrier.exact:
            self.base = {name: own.clone() for name, own in self.block.values().items()}

    def merge(self, parcel: Parcel) -> None:
        """Merge a parcel into the weights of its bridge; then see `share`."""
        parcel.land()
        nodes, local = len(self.nodes.ranks), 2 * parcel.wait or 1
        own = self.block.values()
        for name, mean in parcel.mean.items():
            there = mean + self.base[name] if self.base else mean
            own[name].mul_(local / (local + nodes)).add_(there, alpha=nodes / (local + nodes))

    def share(self, bridge: int) -> None:
        """Give all replicas of the node the weights of the one on a bridge."""
        self.nodes.near.broadcast_(self.block.values(), self.nodes.root(bridge))

    @property
    def bridge(self) -> Comm | None:
        """The active bridge, where I am on it."""
        return self.bridges[self.active]

    def rotate(self) -> None:
        """Make the next bridge the active one."""
        self.active = (self.active + 1) % len(self.bridges)

    # ---- what survives a restart

    def numbers(self) -> dict[str, int]:
        """Return the counters by name."""
        told = {"equal": self.equal, "active": self.active, "skips": self.skips, "wait": self.wait}
        return {**told, "bad": self.plateau.bad}

    def count(self, numbers: Mapping[str, int]) -> None:
        """Take back what `numbers` returned."""
        self.equal, self.plateau.bad = bool(numbers["equal"]), numbers["bad"]
        self.active, self.skips, self.wait = (numbers[key] for key in ("active", "skips", "wait"))

    def state(self) -> dict[str, Tensor]:
        """Return the counters, the best loss, and the parcel that has landed but is not merged."""
        told = {name: torch.tensor(int(each)) for name, each in self.numbers().items()}
        told["best"] = torch.tensor(self.plateau.best, dtype=torch.float64)
        if (parcel := self.parcel) is not None:
            told["parcel"] = torch.tensor([parcel.bridge, parcel.wait, parcel.due])
            told |= {f"stale/{name}": each for name, each in parcel.mean.items()}
        return told | {f"base/{name}": each for name, each in self.base.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self.count({name: int(state[name]) for name in self.numbers()})
        self.plateau.best = float(state["best"])
        if "parcel" in state:
            mean = {name: each.clone() for name, each in under(state, "stale/").items()}
            bridge, wait, due = map(int, state["parcel"].tolist())
            self.parcel = Parcel(bridge, wait, due, mean)
        self.base = {name: each.clone() for name, each in under(state, "base/").items()}
