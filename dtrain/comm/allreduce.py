"""Weighted mean of tensors over ranks: reduce-scatter and all-gather, in a fixed order of sums.

Invariant: one rank owns a piece; it adds the parts in rank order within nodes and in node order
between them, and sends the result back. So all ranks hold the same bits.

    the tensors of one dtype, end to end, cut into equal pieces of at most 1 MiB
    +--------- t0 ----------+- t1 -+------- t2 -------+
    | piece 0 | piece 1 | piece 2  | piece 3 | piece 4 |      pieces inside one tensor are views,
    +---------+---------+----------+---------+---------+      others are packed

    lane 0: piece 0, piece 4, ...     a lane reduces its pieces one after the other, under a tag of
    lane 1: piece 1, ...              its own; lanes run concurrently: inside a node 4, or as many
    lane 2: piece 2, ...              as its ranks if those are more; between nodes all 62, because
    lane 3: piece 3, ...              a piece takes several turns of each end to cross

    one piece, nodes {0 1 2} and {3 4}, owner 1, leader of the other node 4 (`node_topology`)

    0 --w0,t0--> 1 <--t2,w2-- 2         0 <--mean-- 1 --mean--> 2
                 ^                  then             |
                 | w3 t3 + w4 t4                     v
    3 --w3,t3--> 4                      3 <--mean--  4

Traffic for n ranks on m nodes: 2 (n - 1) times the payload in all, of which 2 (m - 1) times between
nodes, whatever the number of ranks per node: 2 (m - 1) / m per node, if m divides the number of
pieces. A node of several ranks sends its sums of bfloat16 and float16 to the owner as float32,
twice as wide. Messages: 2 (n - 1) per piece, and the weights; 64 ranks and 40 MB: 64 pieces, 126
messages per rank of 0.6 MB each, and 8 bytes to each leader of the node.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtrain.comm.backends.base import Request
from dtrain.comm.buffers import BufferPool, as_bytes
from dtrain.comm.staging import Staging, copy_back, require_dense, require_disjoint
from dtrain.comm.transport import Transport
from dtrain.comm.tree import Steps, wait_all

PIECE_BYTES = 1 << 20


MIN_PIECE_BYTES = 1 << 14
"""Smaller pieces cost more in messages than they save in work."""


INTRA_NODE_LANES = 4


MAX_LANES = 62
"""A collective has 64 tags: one per lane, one for the weights, one to compare the calls of ranks.

A mean advances only in turns of its rank, in waits and after actions; between two turns, the data
in flight is what the network can send. Of 37.8 MB over 1 Gbit, work in pieces of 10 ms hid 42 %
with 4 lanes, 78 % with 62, and 56 to 67 % with a helper thread, so there is none.
"""


LANES_PER_TEST = 4
"""Lanes that one `test` advances. Each of them calls MPI, and every such call moves all data in
flight. A mean of 37.8 MB over 1 Gbit took 0.43 s so, and 0.50 s if `test` advances all lanes."""


SUM_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""Dtype of the sums of each dtype."""


Piece = list[Tensor]
"""Spans of the tensors: 1-D views of one dtype."""


@final
class MeanReduction(Request):
    """A mean in flight; `Comm.imean_` makes it and says what it computes."""

    def __init__(
        self,
        transport: Transport,
        tensors: Sequence[Tensor],
        weight: float,
        tag: int,
        buffer_pool: BufferPool,
        staging: Staging,
        wait: Callable[[Callable[[], bool], str], None],
    ) -> None:
        _check_tensors(tensors)
        self._transport = transport
        self._tensors = tensors
        self._tag = tag
        self._buffer_pool = buffer_pool
        self._wait = wait
        self._count_bytes = transport.traffic.enabled
        self.start_time = time.perf_counter()
        self._flats: list[Tensor] = []
        self._lanes: list[Iterator[None]] = []
        self._weights: list[float] | None = None
        self._done = transport.size == 1 and weight == 1
        if self._done:
            return
        topology = transport.topology
        transport.flight.note("mean", self.describe(), "of", transport.name)
        flats = [staging.to_host(tensor).view(-1) for tensor in tensors]
        # A complex number is two real ones.
        self._flats = [torch.view_as_real(f).view(-1) if f.is_complex() else f for f in flats]
        self._pieces = cut_pieces(self._flats, topology.pieces_per_round)
        one_node = len(topology.nodes) == 1
        max_lanes = max(INTRA_NODE_LANES, transport.size) if one_node else MAX_LANES
        self._lane_count = min(max_lanes, MAX_LANES, len(self._pieces))
        lanes = (self._run_lane(lane) for lane in range(self._lane_count))
        self._lanes = [self._exchange_weights(np.array([weight])), *lanes]

    def test(self, all_lanes: bool = False) -> bool:
        """Advance some lanes, or all; return whether the tensors hold the mean."""
        if self._done:
            return True
        count = len(self._lanes) if all_lanes else LANES_PER_TEST
        lanes, other_lanes = self._lanes[:count], self._lanes[count:]
        self._lanes = other_lanes + [lane for lane in lanes if next(lane, self) is not self]
        if not self._lanes:
            for tensor, flat in zip(self._tensors, self._flats, strict=True):
                copy_back(tensor, flat.view(tensor.dtype))
            self._done = True
            seconds = time.perf_counter() - self.start_time
            self._transport.flight.note(
                "averaged", self.describe(), "of", self._transport.name, "in", seconds
            )
        return self._done

    def wait(self) -> None:
        """Return when the tensors hold the mean."""
        if not self.test():
            name, tag = self._transport.name, self._tag
            self._wait(self.test, f"{self.describe()} of {name} with tag {tag}")

    def describe(self) -> str:
        """Return a description for people."""
        return f"a mean of {len(self._tensors)} tensors"

    def _run_lane(self, lane: int) -> Steps:
        """Reduce the pieces of a lane, one after the other."""
        transport, topology = self._transport, self._transport.topology
        tag, counted = self._tag + lane, self._count_bytes
        for number in range(lane, len(self._pieces), self._lane_count):
            leaders, owner = topology.leaders(number)
            leader = leaders[topology.node_index]
            mean_receivers = topology.node_peers if leader == topology.rank else []
            with self._pack_piece(self._pieces[number]) as data, ExitStack() as buffers:
                if owner == topology.rank:
                    yield from self._reduce_nodes(data, leaders, tag)
                    others = [other for other in leaders if other != owner]
                    mean_receivers = [*others, *mean_receivers]
                else:
                    part, reducer = data, leader
                    if leader == topology.rank:
                        reducer = owner
                    if mean_receivers:
                        part = yield from self._reduce_node(data, tag, buffers)
                    yield from wait_all(transport.isend(as_bytes(part), reducer, tag, counted))
                    buffers.close()
                    yield from wait_all(transport.irecv(as_bytes(data), reducer, tag))
                mean = as_bytes(data)
                yield from wait_all(
                    *[transport.isend(mean, rank, tag, counted) for rank in mean_receivers]
                )

    def _exchange_weights(self, weight: npt.NDArray[np.float64]) -> Steps:
        """Send the weight to the ranks that multiply by it; receive those to multiply by here."""
        transport, tag = self._transport, self._tag + MAX_LANES
        topology, piece_count = transport.topology, len(self._pieces)
        weights = np.zeros((transport.size, 1))
        weights[transport.rank] = weight
        receives = [
            transport.irecv(weights[rank].view(np.uint8), rank, tag)
            for rank in topology.weight_senders(piece_count)
        ]
        sends = [
            transport.isend(weight.view(np.uint8), rank, tag, False)
            for rank in sorted(topology.weight_receivers(transport.rank, piece_count))
        ]
        yield from wait_all(*receives)
        self._weights = weights[:, 0].tolist()
        yield from wait_all(*sends)

    def _reduce_node(
        self, data: Tensor, tag: int, buffers: ExitStack
    ) -> Generator[None, None, Tensor]:
        """Return the weighted sum of the parts of this node, in the memory of `buffers`."""
        parts, requests = buffers.enter_context(self._gather_parts(data, tag))
        yield from wait_all(*requests)
        return (yield from self._weighted_sum(parts))

    def _reduce_nodes(self, data: Tensor, leaders: Sequence[int], tag: int) -> Steps:
        """Add up the parts of this node and the sums of the others, in `data`."""
        transport, topology = self._transport, self._transport.topology
        other_leaders = [leader for leader in leaders if leader != transport.rank]
        sizes = dict(zip(leaders, topology.node_sizes, strict=True))
        lone = [leader for leader in other_leaders if sizes[leader] == 1]
        several = [leader for leader in other_leaders if sizes[leader] > 1]
        pool, dtype = self._buffer_pool, SUM_DTYPES[data.dtype]
        with (
            self._gather_parts(data, tag) as (parts, requests),
            pool.lend(len(lone), data) as unweighted,
            pool.lend(len(several), data, dtype) as weighted,
        ):
            sums = dict(zip([*lone, *several], [*unweighted, *weighted], strict=True))
            receives = [
                transport.irecv(as_bytes(buffer), leader, tag) for leader, buffer in sums.items()
            ]
            yield from wait_all(*requests, *receives)
            sums[transport.rank] = yield from self._weighted_sum(parts)
            for leader in lone:
                sums[leader] = yield from self._weighted_sum({leader: sums[leader]})
            data.copy_(ordered_sum([sums[leader] for leader in leaders]))

    @contextmanager
    def _gather_parts(
        self, data: Tensor, tag: int
    ) -> Iterator[tuple[dict[int, Tensor], Sequence[Request]]]:
        """Yield buffers for the parts of this node, in rank order, and the receives that fill them.

        The part of this rank is `data` itself.
        """
        transport, topology = self._transport, self._transport.topology
        peers = topology.node_peers
        with self._buffer_pool.lend(len(peers), data) as buffers:
            parts = {**dict(zip(peers, buffers, strict=True)), transport.rank: data}
            requests = [transport.irecv(as_bytes(parts[rank]), rank, tag) for rank in peers]
            yield {rank: parts[rank] for rank in topology.node_ranks}, requests

    def _weighted_sum(self, parts: Mapping[int, Tensor]) -> Generator[None, None, Tensor]:
        """Return the weighted sum of parts; may overwrite them."""
        while self._weights is None:
            yield
        return weighted_sum(list(parts.values()), [self._weights[rank] for rank in parts])

    @contextmanager
    def _pack_piece(self, piece: Piece) -> Iterator[Tensor]:
        """Yield one span of memory that holds the piece; copy its new content back at the end."""
        if len(piece) == 1:
            yield piece[0]
            return
        ends = list(accumulate(span.numel() for span in piece))
        with self._buffer_pool.lend(1, piece[0].new_empty(ends[-1])) as (data,):
            torch.cat(piece, out=data)
            yield data
            for span, end in zip(piece, ends, strict=True):
                span.copy_(data[end - span.numel() : end])


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of weight x part in the order given; may overwrite the parts.

    Products and sums are separate operations: a fused one would round differently in the vector
    body and in the tail of a loop, and so depend on how the tensors were cut. Equal weights that
    are a power of two multiply the sum: these are the same bits, as long as all numbers are in the
    normal range of the dtype, and fewer passes over memory.
    """
    dtype = SUM_DTYPES[parts[0].dtype]
    if len(parts) > 1 and len(set(weights)) == 1 and math.frexp(weights[0])[0] == 0.5:
        total = ordered_sum(part.to(dtype) for part in parts)
        return total if weights[0] == 1 else total.mul_(weights[0])
    return ordered_sum(
        part.to(dtype) if w == 1 else part.to(dtype).mul_(w)
        for part, w in zip(parts, weights, strict=True)
    )


def ordered_sum(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum in the order given, in the memory of the first."""
    iterator = iter(terms)
    result = next(iterator)
    for term in iterator:
        result.add_(term)
    return result


def cut_pieces(flats: Sequence[Tensor], pieces_per_round: int) -> list[Piece]:
    """Cut 1-D tensors into pieces of at most 1 MiB of one dtype, in whole rounds for each dtype.

    There are fewer pieces than one round if there is too little data.
    """
    dtypes = dict.fromkeys(flat.dtype for flat in flats)
    groups = [[flat for flat in flats if flat.dtype == dtype] for dtype in dtypes]
    return [piece for group in groups for piece in _cut_one_dtype(group, pieces_per_round)]


def _cut_one_dtype(flats: list[Tensor], pieces_per_round: int) -> list[Piece]:
    payload = sum(flat.nbytes for flat in flats)
    min_count = -(-payload // PIECE_BYTES)
    even_count = -(-min_count // pieces_per_round) * pieces_per_round
    count = max(1, min(even_count, max(min_count, payload // MIN_PIECE_BYTES)))
    piece_elements = -(-payload // flats[0].itemsize // count)
    pieces: list[Piece] = []
    room = 0
    for flat in flats:
        start = 0
        while start < flat.numel():
            if not room:
                pieces.append([])
                room = piece_elements
            span = flat[start : start + room]
            pieces[-1].append(span)
            start, room = start + span.numel(), room - span.numel()
    return pieces


def _check_tensors(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors that have no mean or cannot be overwritten."""
    for number, tensor in enumerate(tensors):
        require_dense(tensor, "mean_", number)
        dtype = tensor.dtype
        if (dtype.to_real() if dtype.is_complex else dtype) not in SUM_DTYPES:
            legal = ", ".join(str(dtype) for dtype in SUM_DTYPES)
            raise TypeError(
                f"mean_ of {tensor.dtype} (tensor {number}, shape {tuple(tensor.shape)}): "
                f"means are made of {legal}"
            )
    require_disjoint(tensors, "mean_")
