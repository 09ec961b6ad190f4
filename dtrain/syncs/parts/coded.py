"""Coded: differences that cross between nodes as bytes of a code, all of them to all nodes.

Invariant: a node sends what its ranks have in sum, and each lead decodes all nodes' bytes in the
order of nodes; so all ranks hold the same bits.

Sends between m nodes, per mean, (m - 1) times the code of each node: m (m - 1) in all. A mean of
float32 sends 2 (m - 1) times the numbers: a code of one byte per element is no smaller from eight
nodes on, one of two bits from 32 on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from dtrain.comm.comm import Comm
from dtrain.syncs.parts.carrier import Carrier, Land
from dtrain.syncs.parts.hub import Hub


class Code(ABC):
    """Turns 1-D tensors into bytes and back."""

    @abstractmethod
    def size(self, count: int) -> int:
        """Return the bytes that so many elements need."""

    @abstractmethod
    def encode(self, values: Tensor, key: tuple[int | str, ...]) -> Tensor:
        """Return the bytes (uint8) of `values`; `key` keys random numbers."""

    @abstractmethod
    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return the `count` elements (float32) that `data` stands for."""


@final
class Coded(Carrier):
    """Sums of nodes in a code.

    Parameters
    ----------
    code : Code
    own : tuple of int or str
        Keys this rank's random numbers.
    """

    def __init__(self, code: Code, own: tuple[int | str, ...]) -> None:
        self.code, self.own = code, own
        self._hubs: dict[Comm, Hub] = {}

    def begin(self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int) -> Land:
        """Add up inside nodes, encode, and start to send to all leads."""
        if group.nodes == 1 or not tensors:
            return group.imean_(tensors, weight).wait
        hub = self._hubs.get(group) or self._hubs.setdefault(group, Hub(group))
        if hub.near.size > 1:
            hub.near.mean_(tensors, weight)
        else:
            for each in tensors.values():
                each.mul_(weight)
        trade = None
        if hub.far is not None:
            parts = [
                self.code.encode(each.reshape(-1), (*self.own, name, update))
                for name, each in tensors.items()
            ]
            trade = hub.far.iall_to_all([torch.cat(parts)] * hub.far.size)

        def land() -> None:
            if trade is not None:
                self._add_up(trade.wait(), tensors)
            if hub.near.size > 1:
                hub.near.broadcast_(tensors)

        return land

    def _add_up(self, found: list[Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Write the sum of all nodes' numbers into the tensors."""
        start = 0
        for each in tensors.values():
            count = each.numel()
            end = start + self.code.size(count)
            total = self.code.decode(found[0][start:end], count)
            for data in found[1:]:
                total += self.code.decode(data[start:end], count)
            each.copy_(total.view(each.shape))
            start = end
