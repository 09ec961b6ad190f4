"""Carrier: how differences travel between nodes: as they are, or smaller.

Invariant: all ranks of a group end with the same bits, which the leads of nodes have worked out
from the same messages in the order of nodes; what stays inside a node is exact.

::

    near mean of the node  ->  lead: encode -> to all leads -> decode, add up  ->  near broadcast

Gradients are differences, and so is what a replica moved by since all were equal; weights are not,
and are never made smaller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from dtrain.comm.communicator import Comm
from dtrain.syncs.common.node_groups import NodeLeaders

Completion = Callable[[], None]
"""Finishes what was begun. Collective."""


class Compressor(ABC):
    """Makes weighted means of tensors over a group, in place.

    Attributes
    ----------
    exact : bool
        Whether what comes is the mean itself, so that weights may travel too.
    """

    exact: ClassVar[bool] = False

    @abstractmethod
    def begin(
        self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int
    ) -> Completion:
        """Start ``sum of weight * tensor`` over the group; the tensors hold it once the returned
        function was called. Collective, and nobody may touch them in between.

        `update` and the tensors' names key what is random.
        """

    @final
    def mean_(self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int) -> None:
        """Make the mean at once. Collective."""
        self.begin(group, tensors, weight, update)()

    def state(self) -> dict[str, Tensor]:
        """Return by name what must survive a restart: this rank's own."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take back what `state()` returned."""


@final
class NoCompression(Compressor):
    """The mean as `Comm` makes it."""

    exact: ClassVar[bool] = True

    def begin(
        self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int
    ) -> Completion:
        """Start the mean."""
        return group.imean_(tensors, weight).wait


NO_COMPRESSION = NoCompression()


class Codec(ABC):
    """Turns 1-D tensors into bytes and back.

    Attributes
    ----------
    again : bool
        Whether sums of what it stands for may be coded once more.
    """

    can_reencode: ClassVar[bool] = False

    @abstractmethod
    def encoded_bytes(self, count: int) -> int:
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
class QuantizedMean(Compressor):
    """Sums of nodes in a code.

    Parameters
    ----------
    code : Code
    own : tuple of int or str
        Keys this rank's random numbers.
    """

    def __init__(self, codec: Codec, rng_key: tuple[int | str, ...]) -> None:
        self.codec, self.rng_key = codec, rng_key
        self._node_leaders: dict[Comm, NodeLeaders] = {}

    def begin(
        self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int
    ) -> Completion:
        """Add up inside nodes, encode, and start to send to all leads."""
        if group.node_count == 1 or not tensors:
            return group.imean_(tensors, weight).wait
        hub = self._node_leaders.get(group) or self._node_leaders.setdefault(
            group, NodeLeaders(group)
        )
        if hub.node_group.size > 1:
            hub.node_group.mean_(tensors, weight)
        else:
            for each in tensors.values():
                each.mul_(weight)
        finish: Completion | None = None
        if hub.leader_group is not None:
            sliced = self.codec.can_reencode and hub.leader_group.size > 2
            start = self._exchange_slices if sliced else self._exchange_whole
            finish = start(hub.leader_group, tensors, update)

        def land() -> None:
            if finish is not None:
                finish()
            if hub.node_group.size > 1:
                hub.node_group.broadcast_(tensors)

        return land

    def _exchange_whole(
        self, leader_group: Comm, tensors: Mapping[str, Tensor], update: int
    ) -> Completion:
        """Send all to all leads."""
        chunks = [Chunk(name, 0, each.numel()) for name, each in tensors.items()]
        trade = leader_group.ialltoall([self._encode(chunks, tensors, update)] * leader_group.size)
        return lambda: self._write(chunks, self._sum(trade.wait(), chunks), tensors)

    def _exchange_slices(
        self, leader_group: Comm, tensors: Mapping[str, Tensor], update: int
    ) -> Completion:
        """Send each lead its slice; what it makes of them comes when it lands."""
        cut = slices({name: each.numel() for name, each in tensors.items()}, leader_group.size)
        trade = leader_group.ialltoall([self._encode(own, tensors, update) for own in cut])

        def finish() -> None:
            mine = cut[leader_group.rank]
            sums = self._sum(trade.wait(), mine)
            parts = {chunk.name: part for chunk, part in zip(mine, sums, strict=True)}
            whole = [Chunk(name, 0, len(part)) for name, part in parts.items()]
            codes = self._encode(whole, parts, update)
            most = max(sum(self.codec.encoded_bytes(b - a) for _, a, b in own) for own in cut)
            codes = pad(codes, (0, most - len(codes)))  # what all give has one length
            back = leader_group.ialltoall([codes] * leader_group.size)
            for own, data in zip(cut, back.wait(), strict=True):
                self._write(own, self._decode(data, own), tensors)

        return finish

    def _encode(
        self, chunks: Sequence[Chunk], tensors: Mapping[str, Tensor], update: int
    ) -> Tensor:
        """Return the bytes of parts of tensors, one after the other."""
        codes = [
            self.codec.encode(tensors[n].reshape(-1)[a:b], (*self.rng_key, n, update))
            for n, a, b in chunks
        ]
        return torch.cat(codes) if codes else torch.empty(0, dtype=torch.uint8)

    def _decode(self, data: Tensor, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Return the numbers (float32) of each chunk."""
        found, start = [], 0
        for _, a, b in chunks:
            end = start + self.codec.encoded_bytes(b - a)
            found.append(self.codec.decode(data[start:end], b - a))
            start = end
        return found

    def _sum(self, messages: Sequence[Tensor], chunks: Sequence[Chunk]) -> list[Tensor]:
        """Return the sum of what all nodes sent, chunk by chunk."""
        total = self._decode(messages[0], chunks)
        for data in messages[1:]:
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
