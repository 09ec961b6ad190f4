"""Mean: reduce-scatter and all-gather over point-to-point, in a stated order of summation.

Invariant: one rank owns a piece, adds the parts in rank order within nodes and in the order of
nodes between them, and the result goes back the same way; so all ranks hold the same bits.

    the tensors of one dtype, end to end, cut into equal pieces of at most 1 MiB
    +--------- t0 ----------+- t1 -+------- t2 -------+
    | piece 0 | piece 1 | piece 2  | piece 3 | piece 4 |      pieces inside one tensor are views,
    +---------+---------+----------+---------+---------+      others are packed

    lane 0: piece 0, piece 4, ...     a lane takes its pieces one after the other and has a tag of
    lane 1: piece 1, ...              its own; lanes run beside each other: 4 inside a node, as
    lane 2: piece 2, ...              many as its ranks if those are more; all 62 between nodes,
    lane 3: piece 3, ...              for a piece takes several turns of each end to cross

    one piece, nodes {0 1 2} and {3 4}, owner 1, lead of the other node 4 (`tiers`)

    0 --w0,t0--> 1 <--t2,w2-- 2         0 <--mean-- 1 --mean--> 2
                 ^                  then             |
                 | w3 t3 + w4 t4                     v
    3 --w3,t3--> 4                      3 <--mean--  4

Sent, for n ranks on m nodes: 2 (n - 1) times the payload in all, of which 2 (m - 1) times between
nodes, whatever the ranks of a node: 2 (m - 1) / m per node, where the pieces divide by m. From a
node of several ranks, sums of bfloat16 and float16 go up to the owner as float32, twice as wide.
Messages: 2 (n - 1) per piece, and the weights; 64 ranks and 40 MB: 64 pieces, 126 messages per
rank of 0.6 MB each, besides 8 bytes to each lead of the node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
"""A collective has 64 tags: one per lane, one for the weights, one for the roll.

A mean goes on in the turns of its rank alone, in waits and after actions, and what is under way
between two of them is what the wire can send: of 37.8 MB over 1 Gbit, work in pieces of 10 ms hid
42 % with 4 lanes, 78 % with 62, and 56 to 67 % with a helper thread, so there is none.
"""


LANES_PER_TEST = 4
"""Lanes that one look goes on with: each asks MPI, and every question moves all that is in flight.
A mean of 37.8 MB over 1 Gbit took 0.43 s so, and 0.50 s with a look at all of its lanes."""


SUM_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""In which dtype sums are made."""


Piece = list[Tensor]
"""Spans of the tensors: 1-D views of one dtype."""


@final
class MeanReduction(Request):
    """A mean in flight; made by `Comm.imean_`, which says what it means."""

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
        self._transport, self._tag, self._buffer_pool, self._wait = (
            transport,
            tag,
            buffer_pool,
            wait,
        )
        self._count_bytes, self._tensors = transport.traffic.enabled, tensors
        self.start_time = time.perf_counter()
        self._flats: list[Tensor] = []
        self._lanes: list[Iterator[None]] = []
        self._weights: list[float] | None = None
        self._done = transport.size == 1 and weight == 1
        if self._done:
            return
        transport.flight.note("mean", self.describe(), "of", transport.name)
        self._flats = [staging.to_host(tensor).view(-1) for tensor in tensors]
        self._pieces = cut_pieces(self._flats, transport.topology.pieces_per_round)
        near = len(transport.topology.nodes) == 1
        most = max(INTRA_NODE_LANES, transport.size) if near else MAX_LANES
        self._lane_count = min(most, MAX_LANES, len(self._pieces))
        lanes = (self._run_lane(lane) for lane in range(self._lane_count))
        self._lanes = [self._exchange_weights(np.array([weight])), *lanes]

    def test(self, all_lanes: bool = False) -> bool:
        """Go on with some lanes, or the `whole`; return whether the tensors hold the mean."""
        if self._done:
            return True
        count = len(self._lanes) if all_lanes else LANES_PER_TEST
        few, rest = self._lanes[:count], self._lanes[count:]
        self._lanes = rest + [lane for lane in few if next(lane, self) is not self]
        if not self._lanes:
            for tensor, flat in zip(self._tensors, self._flats, strict=True):
                copy_back(tensor, flat)
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
        """Return what it is, for people."""
        return f"a mean of {len(self._tensors)} tensors"

    def _run_lane(self, lane: int) -> Iterator[None]:
        tiers = self._transport.topology
        for number in range(lane, len(self._pieces), self._lane_count):
            home, tag = tiers.owner_node(number), self._tag + lane
            leads = [tiers.leader(number, node) for node in range(len(tiers.nodes))]
            near = leads[tiers.node_index]
            with self._pack_piece(self._pieces[number]) as data:
                if near != tiers.rank:
                    yield from self._send_to_leader(data, near, tag)
                elif near == leads[home]:
                    yield from self._reduce_as_owner(data, leads, tag)
                elif len(tiers.node_ranks) == 1:
                    yield from self._send_to_leader(data, leads[home], tag)
                else:
                    yield from self._reduce_in_node(data, leads[home], tag)

    def _exchange_weights(self, weight: npt.NDArray[np.float64]) -> Steps:
        """Tell my weight to those who multiply by it; learn those by which I multiply."""
        line, tag, pieces = self._transport, self._tag + MAX_LANES, len(self._pieces)
        weights = np.zeros((line.size, 1))
        weights[line.rank] = weight
        speakers, listeners = (
            line.topology.weight_senders(pieces),
            line.topology.weight_receivers(line.rank, pieces),
        )
        learnt = [line.irecv(weights[rank].view(np.uint8), rank, tag) for rank in speakers]
        told = [line.isend(weight.view(np.uint8), rank, tag, False) for rank in sorted(listeners)]
        yield from wait_all(*learnt)
        self._weights = weights[:, 0].tolist()
        yield from wait_all(*told)

    def _send_to_leader(self, data: Tensor, leader: int, tag: int) -> Steps:
        """Send my part to who adds it up; the mean comes back into the same memory."""
        yield from wait_all(self._transport.isend(as_bytes(data), leader, tag, self._count_bytes))
        yield from wait_all(self._transport.irecv(as_bytes(data), leader, tag))

    def _reduce_in_node(self, data: Tensor, owner: int, tag: int) -> Steps:
        """Add up the parts of my node, send the sum to the owner, and pass the mean on."""
        with self._gather_parts(data, tag) as (parts, requests):
            yield from wait_all(*requests)
            added = yield from self._weighted_sum(parts)
            yield from wait_all(
                self._transport.isend(as_bytes(added), owner, tag, self._count_bytes)
            )
        yield from wait_all(self._transport.irecv(as_bytes(data), owner, tag))
        yield from self._send_to_ranks(data, self._node_peers(), tag)

    def _reduce_as_owner(self, data: Tensor, leaders: Sequence[int], tag: int) -> Steps:
        """Add up the parts of my node and the sums of the others; send the mean to all."""
        line, nodes = self._transport, self._transport.topology.nodes
        far = [(lead, len(ranks)) for lead, ranks in zip(leaders, nodes, strict=True)]
        lone = [lead for lead, size in far if size == 1 and lead != line.rank]
        several = [lead for lead, size in far if size > 1 and lead != line.rank]
        scratch, dtype = self._buffer_pool, SUM_DTYPES[data.dtype]
        with (
            self._gather_parts(data, tag) as (parts, requests),
            scratch.lend(len(lone), data) as raws,
            scratch.lend(len(several), data, dtype) as sums,
        ):
            told = dict(zip([*lone, *several], [*raws, *sums], strict=True))
            pulls = [line.irecv(as_bytes(part), lead, tag) for lead, part in told.items()]
            yield from wait_all(*requests, *pulls)
            told[line.rank] = yield from self._weighted_sum(parts)
            for lead in lone:
                told[lead] = yield from self._weighted_sum({lead: told[lead]})
            data.copy_(ordered_sum([told[lead] for lead in leaders]))
        others = [lead for lead in leaders if lead != line.rank]
        yield from self._send_to_ranks(data, [*others, *self._node_peers()], tag)

    def _node_peers(self) -> list[int]:
        """Return the other ranks of my node."""
        return [
            rank for rank in self._transport.topology.node_ranks if rank != self._transport.rank
        ]

    @contextmanager
    def _gather_parts(
        self, data: Tensor, tag: int
    ) -> Iterator[tuple[dict[int, Tensor], list[Request]]]:
        """Lend the parts of my node, by rank in rank order, mine included, and what brings them."""
        line, others = self._transport, self._node_peers()
        with self._buffer_pool.lend(len(others), data) as blocks:
            parts = {**dict(zip(others, blocks, strict=True)), line.rank: data}
            requests = [line.irecv(as_bytes(parts[rank]), rank, tag) for rank in others]
            yield {rank: parts[rank] for rank in line.topology.node_ranks}, requests

    def _weighted_sum(self, parts: Mapping[int, Tensor]) -> Generator[None, None, Tensor]:
        """Return the weighted sum of parts; may overwrite them."""
        while self._weights is None:
            yield
        return weighted_sum(list(parts.values()), [self._weights[rank] for rank in parts])

    def _send_to_ranks(self, data: Tensor, ranks: Sequence[int], tag: int) -> Steps:
        yield from wait_all(
            *[self._transport.isend(as_bytes(data), r, tag, self._count_bytes) for r in ranks]
        )

    @contextmanager
    def _pack_piece(self, piece: Piece) -> Iterator[Tensor]:
        """Lend one span of memory that holds the piece, and put its new content back at the end."""
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
    body and in the tail of a loop, and so depend on how the tensors were cut.
    """
    dtype = SUM_DTYPES[parts[0].dtype]
    return ordered_sum(
        part.to(dtype) if w == 1 else part.to(dtype).mul_(w)
        for part, w in zip(parts, weights, strict=True)
    )


def ordered_sum(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum in the order given, in the memory of the first."""
    rest = iter(terms)
    result = next(rest)
    for term in rest:
        result.add_(term)
    return result


def cut_pieces(flats: Sequence[Tensor], size: int) -> list[Piece]:
    """Cut 1-D tensors into pieces of at most 1 MiB of one dtype, as many for each of `size` ranks.

    Where there is too little data for all ranks there are fewer pieces.
    """
    dtypes = dict.fromkeys(flat.dtype for flat in flats)
    groups = [[flat for flat in flats if flat.dtype == dtype] for dtype in dtypes]
    return [piece for group in groups for piece in _cut_one_dtype(group, size)]


def _cut_one_dtype(flats: list[Tensor], size: int) -> list[Piece]:
    payload = sum(flat.nbytes for flat in flats)
    least = -(-payload // PIECE_BYTES)
    even = -(-least // size) * size
    count = max(1, min(even, max(least, payload // MIN_PIECE_BYTES)))
    step = -(-payload // flats[0].itemsize // count)  # elements per piece
    pieces: list[Piece] = []
    room = 0
    for flat in flats:
        start = 0
        while start < flat.numel():
            if not room:
                pieces.append([])
                room = step
            span = flat[start : start + room]
            pieces[-1].append(span)
            start, room = start + span.numel(), room - span.numel()
    return pieces


def _check_tensors(tensors: Sequence[Tensor]) -> None:
    """Refuse what has no mean, or cannot be overwritten."""
    for number, tensor in enumerate(tensors):
        require_dense(tensor, "mean_", number)
        if tensor.dtype not in SUM_DTYPES:
            legal = ", ".join(str(dtype) for dtype in SUM_DTYPES)
            raise TypeError(
                f"mean_ of {tensor.dtype} (tensor {number}, shape {tuple(tensor.shape)}): "
                f"means are made of {legal}"
            )
    require_disjoint(tensors, "mean_")
