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

from dtrain.block import Block
from dtrain.comm.comm import Comm
from dtrain.comm.mean import Mean
from dtrain.early import Group
from dtrain.syncs.parts.nodes import Nodes, bridged
from dtrain.syncs.parts.plateau import Plateau
from dtrain.syncs.sync import Clock


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
    mean : list of Tensor
        The nodes' weights, averaged once `land` returns; empty where I am not on the bridge.
    """

    bridge: int
    wait: int
    due: int
    mean: list[Tensor] = field(default_factory=list)
    handle: Mean | None = None

    def land(self) -> None:
        """Wait until the mean is here."""
        if self.handle is not None:
            self.handle.wait()
            self.handle = None


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

    def __init__(self, block: Block, replicas: Comm, limits: Limits, alone: bool = False) -> None:
        self.block, self.replicas, self.limits = block, replicas, limits
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
            values = self.block.values().values()
            parcel.mean = [own.to(dtype or own.dtype, copy=True) for own in values]
            parcel.handle = group.imean_(parcel.mean, self.nodes.share)
        return parcel

    def merge(self, parcel: Parcel) -> None:
        """Merge a parcel into the weights of its bridge; then see `share`."""
        parcel.land()
        nodes, local = len(self.nodes.ranks), 2 * parcel.wait or 1
        for own, mean in zip(self.block.values().values(), parcel.mean, strict=False):
            own.mul_(local / (local + nodes)).add_(mean, alpha=nodes / (local + nodes))

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
            told |= {f"stale/{number}": each for number, each in enumerate(parcel.mean)}
        return told

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self.count({name: int(state[name]) for name in self.numbers()})
        self.plateau.best = float(state["best"])
        if "parcel" in state:
            held = sum(name.startswith("stale/") for name in state)
            mean = [state[f"stale/{number}"].clone() for number in range(held)]
            bridge, wait, due = map(int, state["parcel"].tolist())
            self.parcel = Parcel(bridge, wait, due, mean)
