"""Ledger: what a sync that makes matrices smaller has sent for each weight, and their ranks.

Invariant: numbers are counted as they cross between nodes, twice per node but one for a mean, as
`every-step` sends those of a weight in every update; where all replicas share a node, as if each
had its own. Counts go on after a restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from dtrain.syncs.sync import Entry, under
from dtrain.weights import Weights, whole


@final
class Ledger:
    """Counts for the weights of one block.

    Parameters
    ----------
    weights : Weights
        While none of them is a product.
    hosts : sequence of str
        Where each replica is.
    """

    def __init__(self, weights: Weights, hosts: Sequence[str]) -> None:
        places = range(len(hosts)) if len(set(hosts)) == 1 else hosts
        self._places: list[int | str] = list(places)
        self._weights, self._ranks = weights, dict[str, int]()
        self._numbers = {name: each.numel() for name, each in weights.values().items()}
        self._sent = dict.fromkeys(self._numbers, 0.0)
        self._updates = 0

    def ranks(self, ranks: Mapping[str, int]) -> None:
        """Hear at which ranks matrices are products now."""
        self._ranks |= ranks

    def mean(self, values: Mapping[str, Tensor], among: Iterable[int] | None = None) -> None:
        """Count a mean of tensors, weights or parts of one, among replicas; None: all."""
        self.add({name: each.numel() for name, each in values.items()}, among)

    def add(self, numbers: Mapping[str, float], among: Iterable[int] | None = None) -> None:
        """Count a mean of so many numbers for each weight, or part of one."""
        for name, count in numbers.items():
            self._sent[whole(name)] += 2 * self._crossings(among) * count

    def update(self) -> None:
        """Count an update."""
        self._updates += 1

    def _crossings(self, among: Iterable[int] | None = None) -> int:
        own = self._places if among is None else [self._places[rank] for rank in among]
        return len(set(own)) - 1

    def entries(self) -> dict[str, Entry]:
        """Return what is known of each weight."""
        every = 2 * self._crossings() * self._updates
        found: dict[str, Entry] = {}
        for name, numbers in self._numbers.items():
            rank, held = self._ranks.get(name), numbers
            if rank is not None:
                held = min(numbers, rank * sum(self._weights.shape(name)))
            sent = self._sent[name]
            found[name] = Entry(
                rank=rank, numbers=numbers, held=held, sent=sent, plain=every * numbers
            )
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the counts."""
        sent = {f"sent/{name}": torch.tensor(each) for name, each in self._sent.items()}
        ranks = {f"rank/{name}": torch.tensor(each) for name, each in self._ranks.items()}
        return {"updates": torch.tensor(self._updates), **sent, **ranks}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` returned."""
        self._updates = int(state["updates"])
        self._sent = {name: float(each) for name, each in under(state, "sent/").items()}
        self._ranks = {name: int(each) for name, each in under(state, "rank/").items()}
