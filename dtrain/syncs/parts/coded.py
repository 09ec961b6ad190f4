"""Coded: differences that cross between nodes as bytes of a code.

Invariant: a node sends what its ranks have in sum, and sums are made in the order of nodes; all
ranks decode the same bytes, so all hold the same bits.

Between m nodes, N numbers of a mean, by leads::

    all to all      each sends all its numbers to each other: m (m - 1) N codes in all
    in slices       each sends each other its slice of N / m, adds up what it was sent, codes the
                    sum, and sends that: 2 (m - 1) N, as a mean does, but a number is coded twice

Two nodes send as much either way; from three on it is slices, where a code may be coded again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from dtrain.comm.comm import Comm
from dtrain.syncs.parts.carrier import Carrier, Land
from dtrain.syncs.parts.hub import Hub


class Code(ABC):
    """Turns 1-D tensors into bytes and back.

    Attributes
    ----------
    again : bool
        Whether sums of what it stands for may be coded once more.
    """

    again: ClassVar[bool] = False

    @abstractmethod
    def size(self, count: int) -> int:
        """Return the bytes that so many elements need."""

    @abstractmethod
    def encode(self, values: Tensor, key: tuple[int | str, ...]) -> Tensor:
        """Return the bytes (uint8) of `values`; `key` keys random numbers."""

    @abstractmethod
    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return the `count` elements (float32) that `data` stands for."""


class Chunk(NamedTuple):
    """Elements `start` to `stop` of a tensor, flat."""

    name: str
    start: int
    stop: int


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
        finish: Land | None = None
        if hub.far is not None:
            sliced = self.code.again and hub.far.size > 2
            start = self._slices if sliced else self._whole
            finish = start(hub.far, tensors, update)

        def land() -> None:
            if finish is not None:
                finish()
            if hub.near.size > 1:
                hub.near.broadcast_(tensors)

        return land

    def _whole(self, far: Comm, tensors: Mapping[str, Tensor], update: int) -> Land:
        """Send all to all leads."""
        chunks = [Chunk(name, 0, each.numel()) for name, each in tensors.items()]
        trade = far.iall_to_all([self._encode(chunks, tensors, update)] * far.size)
        return lambda: self._write(chunks, self._sum(trade.wait(), chunks), tensors)

    def _slices(self, far: Comm, tensors: Mapping[str, Tensor], update: int) -> Land:
        """Send each lead its slice; what it makes of them comes when it lands."""
        cut = slices({name: each.numel() for name, each in tensors.items()}, far.size)
        trade = far.iall_to_all([self._encode(own, tensors, update) for own in cut])

        def finish() -> None:
            mine = cut[far.rank]
            sums = self._sum(trade.wait(), mine)
            parts = {chunk.name: part for chunk, part in zip(mine, sums, strict=True)}
            whole = [Chunk(name, 0, len(part)) for name, part in parts.items()]
            codes = self._encode(whole, parts, update)
            most = max(sum(self.code.size(b - a) for _, a, b in own) for own in cut)
            codes = pad(codes, (0, most - len(codes)))  # what all give has one length
            back = far.iall_to_all([codes] * far.size)
            for own, data in zip(cut, back.wait(), strict=True):
                self._write(own, self._decode(data, own), tensors)

        return finish

    def _encode(
        self, chunks: Sequence[Chunk], tensors: Mapping[str, Tensor], update: int
    ) -> Tensor:
        """Return the bytes of parts of tensors, one after the other."""
        codes = [
            self.code.encode(tensors[n].reshape(-1)[a:b], (*self.own, n, update))
            for n, a, b in chunks
        ]
        return torch.cat(codes) if codes else torch.empty(0, dtype=torch.uint8)

    def _decode(self, data: Tensor, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Return the numbers (float32) of each chunk."""
        found, start = [], 0
        for _, a, b in chunks:
            end = start + self.code.size(b - a)
            found.append(self.code.decode(data[start:end], b - a))
            start = end
        return found

    def _sum(self, everyone: Sequence[Tensor], chunks: Sequence[Chunk]) -> list[Tensor]:
        """Return the sum of what all nodes sent, chunk by chunk."""
        total = self._decode(everyone[0], chunks)
        for data in everyone[1:]:
            for own, part in zip(total, self._decode(data, chunks), strict=True):
                own += part
        return total

    def _write(
        self, chunks: Sequence[Chunk], parts: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> None:
        """Put numbers where they belong."""
        for (name, a, b), part in zip(chunks, parts, strict=True):
            own = tensors[name]
            flat = own.reshape(-1)
            flat[a:b] = part
            if not own.is_contiguous():  # then that was a copy
                own.copy_(flat.view(own.shape))


def slices(sizes: Mapping[str, int], count: int) -> list[list[Chunk]]:
    """Return `count` slices of tensors of so many elements, laid end to end, nearly equal.

    >>> [[tuple(chunk) for chunk in own] for own in slices({"a": 3, "b": 5}, 2)]
    [[('a', 0, 3), ('b', 0, 1)], [('b', 1, 5)]]
    """
    total, first = sum(sizes.values()), 0
    borders = [total * i // count for i in range(count + 1)]
    found: list[list[Chunk]] = [[] for _ in range(count)]
    for name, size in sizes.items():
        for own, (low, high) in zip(found, pairwise(borders), strict=True):
            a, b = max(first, low) - first, min(first + size, high) - first
            if a < b:
                own.append(Chunk(name, a, b))
        first += size
    return found
