"""Compressors: weighted means of differences over a group, sent smaller between nodes.

Gradients are differences, and so are the deltas of weights since all replicas were equal. Weights
themselves are never compressed. A quantizing compressor works in three stages::

    exact mean in each node  ->  leader: encode -> to all leaders -> decode, add  ->  broadcast
                                                                                      in the node

With N elements on m nodes the leaders send m (m - 1) codes of N elements in all. A codec that may
encode sums again, on more than two nodes, sends slices instead, 2 (m - 1) codes in all: each leader
adds up one slice and sends the sum to the others.

Invariant: all ranks of a group end with the same bits, because leaders add up the same messages in
the order of nodes. Transfers inside a node are exact.
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
"""Waits for an operation in flight and writes its result. Collective over the group."""


class Compressor(ABC):
    """Weighted means of tensors over a group, in place.

    Attributes
    ----------
    exact : bool
        Whether the result is the mean itself, so that weights may be averaged too.
    """

    exact: ClassVar[bool] = False

    @abstractmethod
    def begin(
        self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int
    ) -> Completion:
        """Start ``sum of weight * tensor`` over the group. Collective over the group.

        The tensors hold the sum once the returned function has been called; until then they must
        not be used. Their names and `update` key random numbers.
        """

    @final
    def mean_(self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int) -> None:
        """Replace the tensors by ``sum of weight * tensor``. Collective over the group."""
        self.begin(group, tensors, weight, update)()

    def state(self) -> dict[str, Tensor]:
        """Return by name the state of this rank that a restart needs."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Load the tensors that `state` returned."""


@final
class NoCompression(Compressor):
    """The exact mean of `Comm`."""

    exact: ClassVar[bool] = True

    def begin(
        self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int
    ) -> Completion:
        """Start the exact mean. Collective over the group."""
        return group.imean_(tensors, weight).wait


NO_COMPRESSION = NoCompression()


class Codec(ABC):
    """A code that turns 1-D tensors into bytes and back.

    Attributes
    ----------
    can_reencode : bool
        Whether sums of decoded tensors may be encoded again.
    """

    can_reencode: ClassVar[bool] = False

    @abstractmethod
    def encoded_bytes(self, count: int) -> int:
        """Return the bytes of `count` encoded elements."""

    @abstractmethod
    def encode(self, values: Tensor, key: tuple[int | str, ...]) -> Tensor:
        """Return the bytes (uint8) of a tensor (count,); `key` seeds random numbers."""

    @abstractmethod
    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return the `count` elements (float32) that `data` encodes."""


class Chunk(NamedTuple):
    """Elements `start` to `stop` of a flattened tensor."""

    name: str
    start: int
    stop: int


@final
class QuantizedMean(Compressor):
    """Means whose messages between nodes are encoded.

    Parameters
    ----------
    codec : Codec
    rng_key : tuple of int or str
        Keys the random numbers of this rank.
    """

    def __init__(self, codec: Codec, rng_key: tuple[int | str, ...]) -> None:
        self.codec = codec
        self.rng_key = rng_key
        self._leaders_of_group: dict[Comm, NodeLeaders] = {}

    def begin(
        self, group: Comm, tensors: Mapping[str, Tensor], weight: float, update: int
    ) -> Completion:
        """Add up inside the node, and start to send the encoded sums. Collective over the group."""
        if group.node_count == 1 or not tensors:
            return group.imean_(tensors, weight).wait
        leaders = self._node_leaders(group)
        if leaders.node_group.size > 1:
            leaders.node_group.mean_(tensors, weight)
        else:
            for tensor in tensors.values():
                tensor.mul_(weight)
        finish_exchange: Completion | None = None
        if leaders.leader_group is not None:
            sliced = self.codec.can_reencode and leaders.leader_group.size > 2
            start_exchange = self._exchange_slices if sliced else self._exchange_whole
            finish_exchange = start_exchange(leaders.leader_group, tensors, update)

        def finish() -> None:
            if finish_exchange is not None:
                finish_exchange()
            if leaders.node_group.size > 1:
                leaders.node_group.broadcast_(tensors)

        return finish

    def _node_leaders(self, group: Comm) -> NodeLeaders:
        """Return the leaders of a group, made at its first mean. Collective over the group."""
        if group not in self._leaders_of_group:
            self._leaders_of_group[group] = NodeLeaders(group)
        return self._leaders_of_group[group]

    def _exchange_whole(
        self, leader_group: Comm, tensors: Mapping[str, Tensor], update: int
    ) -> Completion:
        """Start to send all tensors to all leaders, which add them up."""
        chunks = [Chunk(name, 0, tensor.numel()) for name, tensor in tensors.items()]
        code = self._encode(chunks, tensors, update)
        exchange = leader_group.ialltoall([code] * leader_group.size)
        return lambda: self._write(chunks, self._sum(exchange.wait(), chunks), tensors)

    def _exchange_slices(
        self, leader_group: Comm, tensors: Mapping[str, Tensor], update: int
    ) -> Completion:
        """Start to send each leader its slice, whose encoded sum it sends back in the end."""
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        chunks_of_leader = slices(sizes, leader_group.size)
        exchange = leader_group.ialltoall(
            [self._encode(chunks, tensors, update) for chunks in chunks_of_leader]
        )

        def finish() -> None:
            local_chunks = chunks_of_leader[leader_group.rank]
            sums = self._sum(exchange.wait(), local_chunks)
            sum_of = {chunk.name: part for chunk, part in zip(local_chunks, sums, strict=True)}
            whole = [Chunk(name, 0, len(part)) for name, part in sum_of.items()]
            code = self._encode(whole, sum_of, update)
            length = max(
                sum(self.codec.encoded_bytes(stop - start) for _, start, stop in chunks)
                for chunks in chunks_of_leader
            )
            code = pad(code, (0, length - len(code)))  # all messages have one length
            gathered = leader_group.ialltoall([code] * leader_group.size).wait()
            for chunks, data in zip(chunks_of_leader, gathered, strict=True):
                self._write(chunks, self._decode(data, chunks), tensors)

        return finish

    def _encode(
        self, chunks: Sequence[Chunk], tensors: Mapping[str, Tensor], update: int
    ) -> Tensor:
        """Return the encoded chunks of tensors, concatenated."""
        codes = [
            self.codec.encode(tensors[name].reshape(-1)[start:stop], (*self.rng_key, name, update))
            for name, start, stop in chunks
        ]
        return torch.cat(codes) if codes else torch.empty(0, dtype=torch.uint8)

    def _decode(self, data: Tensor, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Return the elements (float32) of each chunk."""
        parts, offset = [], 0
        for _, start, stop in chunks:
            end = offset + self.codec.encoded_bytes(stop - start)
            parts.append(self.codec.decode(data[offset:end], stop - start))
            offset = end
        return parts

    def _sum(self, messages: Sequence[Tensor], chunks: Sequence[Chunk]) -> list[Tensor]:
        """Return the sum over the messages of all nodes, for each chunk."""
        sums = self._decode(messages[0], chunks)
        for data in messages[1:]:
            for total, part in zip(sums, self._decode(data, chunks), strict=True):
                total += part
        return sums

    def _write(
        self, chunks: Sequence[Chunk], parts: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> None:
        """Write the elements of chunks into the tensors that they are parts of."""
        for (name, start, stop), part in zip(chunks, parts, strict=True):
            tensor = tensors[name]
            flat = tensor.reshape(-1)
            flat[start:stop] = part
            if not tensor.is_contiguous():  # then `flat` is a copy
                tensor.copy_(flat.view(tensor.shape))


def slices(sizes: Mapping[str, int], count: int) -> list[list[Chunk]]:
    """Return `count` nearly equal slices of tensors that are laid end to end.

    `sizes` has the elements of each tensor. No slice is more than one element longer than another.

    >>> [[tuple(chunk) for chunk in chunks] for chunks in slices({"a": 3, "b": 5}, 2)]
    [[('a', 0, 3), ('b', 0, 1)], [('b', 1, 5)]]
    """
    total = sum(sizes.values())
    borders = [total * index // count for index in range(count + 1)]
    result: list[list[Chunk]] = [[] for _ in range(count)]
    offset = 0
    for name, size in sizes.items():
        for chunks, (low, high) in zip(result, pairwise(borders), strict=True):
            start, stop = max(offset, low) - offset, min(offset + size, high) - offset
            if start < stop:
                chunks.append(Chunk(name, start, stop))
        offset += size
    return result
