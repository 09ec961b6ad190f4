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

from dtrain.comm.dock import Dock, apart, dense, settle
from dtrain.comm.line import Line
from dtrain.comm.memory import Scratch, raw
from dtrain.comm.tree import Steps, until
from dtrain.comm.wire import Request

PIECE_BYTES = 1 << 20
ENOUGH_BYTES = 1 << 14
"""Smaller pieces cost more in messages than they save in work."""

LANES = 4
MOST_LANES = 62
"""A collective has 64 tags: one per lane, one for the weights, one for the roll.

A mean goes on in the turns of its rank alone, in waits and after actions, and what is under way
between two of them is what the wire can send: of 37.8 MB over 1 Gbit, work in pieces of 10 ms hid
42 % with 4 lanes, 78 % with 62, and 56 to 67 % with a helper thread, so there is none.
"""

SWEEP = 4
"""Lanes that one look goes on with: each asks MPI, and every question moves all that is in flight.
A mean of 37.8 MB over 1 Gbit took 0.43 s so, and 0.50 s with a look at all of its lanes."""

SUMS = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""In which dtype sums are made."""

Piece = list[Tensor]
"""Spans of the tensors: 1-D views of one dtype."""


@final
class Mean(Request):
    """A mean in flight; made by `Comm.imean_`, which says what it means."""

    def __init__(
        self,
        line: Line,
        tensors: Sequence[Tensor],
        weight: float,
        tag: int,
        scratch: Scratch,
        dock: Dock,
        wait: Callable[[Callable[[], bool], str], None],
    ) -> None:
        _check(tensors)
        self._line, self._tag, self._scratch, self._wait = line, tag, scratch, wait
        self._counted, self._tensors = line.traffic.on, tensors
        self.since = time.perf_counter()
        self._flats: list[Tensor] = []
        self._lanes: list[Iterator[None]] = []
        self._weights: list[float] | None = None
        self._over = line.size == 1 and weight == 1
        if self._over:
            return
        line.flight.note("mean", self.words(), "of", line.name)
        self._flats = [dock.lower(tensor).view(-1) for tensor in tensors]
        self._pieces = cut(self._flats, line.tiers.even)
        near = len(line.tiers.nodes) == 1
        most = max(LANES, line.size) if near else MOST_LANES
        self._width = min(most, MOST_LANES, len(self._pieces))
        lanes = (self._lane(lane) for lane in range(self._width))
        self._lanes = [self._share(np.array([weight])), *lanes]

    def test(self, whole: bool = False) -> bool:
        """Go on with some lanes, or the `whole`; return whether the tensors hold the mean."""
        if self._over:
            return True
        count = len(self._lanes) if whole else SWEEP
        few, rest = self._lanes[:count], self._lanes[count:]
        self._lanes = rest + [lane for lane in few if next(lane, self) is not self]
        if not self._lanes:
            for tensor, flat in zip(self._tensors, self._flats, strict=True):
                settle(tensor, flat)
            self._over = True
            seconds = time.perf_counter() - self.since
            self._line.flight.note("averaged", self.words(), "of", self._line.name, "in", seconds)
        return self._over

    def wait(self) -> None:
        """Return when the tensors hold the mean."""
        if not self.test():
            name, tag = self._line.name, self._tag
            self._wait(self.test, f"{self.words()} of {name} with tag {tag}")

    def words(self) -> str:
        """Return what it is, for people."""
        return f"a mean of {len(self._tensors)} tensors"

    def _lane(self, lane: int) -> Iterator[None]:
        tiers = self._line.tiers
        for number in range(lane, len(self._pieces), self._width):
            home, tag = tiers.home(number), self._tag + lane
            leads = [tiers.lead(number, node) for node in range(len(tiers.nodes))]
            near = leads[tiers.node]
            with self._packed(self._pieces[number]) as data:
                if near != tiers.rank:
                    yield from self._lend(data, near, tag)
                elif near == leads[home]:
                    yield from self._own(data, leads, tag)
                elif len(tiers.near) == 1:
                    yield from self._lend(data, leads[home], tag)
                else:
                    yield from self._relay(data, leads[home], tag)

    def _share(self, mine: npt.NDArray[np.float64]) -> Steps:
        """Tell my weight to those who multiply by it; learn those by which I multiply."""
        line, tag, pieces = self._line, self._tag + MOST_LANES, len(self._pieces)
        weights = np.zeros((line.size, 1))
        weights[line.rank] = mine
        speakers, listeners = line.tiers.speakers(pieces), line.tiers.listeners(line.rank, pieces)
        learnt = [line.pull(weights[rank].view(np.uint8), rank, tag) for rank in speakers]
        told = [line.push(mine.view(np.uint8), rank, tag, False) for rank in sorted(listeners)]
        yield from until(*learnt)
        self._weights = weights[:, 0].tolist()
        yield from until(*told)

    def _lend(self, data: Tensor, lead: int, tag: int) -> Steps:
        """Send my part to who adds it up; the mean comes back into the same memory."""
        yield from until(self._line.push(raw(data), lead, tag, self._counted))
        yield from until(self._line.pull(raw(data), lead, tag))

    def _relay(self, data: Tensor, owner: int, tag: int) -> Steps:
        """Add up the parts of my node, send the sum to the owner, and pass the mean on."""
        with self._gathered(data, tag) as (parts, requests):
            yield from until(*requests)
            added = yield from self._added(parts)
            yield from until(self._line.push(raw(added), owner, tag, self._counted))
        yield from until(self._line.pull(raw(data), owner, tag))
        yield from self._spread(data, self._near(), tag)

    def _own(self, data: Tensor, leads: Sequence[int], tag: int) -> Steps:
        """Add up the parts of my node and the sums of the others; send the mean to all."""
        line, nodes = self._line, self._line.tiers.nodes
        far = [(lead, len(ranks)) for lead, ranks in zip(leads, nodes, strict=True)]
        lone = [lead for lead, size in far if size == 1 and lead != line.rank]
        several = [lead for lead, size in far if size > 1 and lead != line.rank]
        scratch, dtype = self._scratch, SUMS[data.dtype]
        with (
            self._gathered(data, tag) as (parts, requests),
            scratch.lend(len(lone), data) as raws,
            scratch.lend(len(several), data, dtype) as sums,
        ):
            told = dict(zip([*lone, *several], [*raws, *sums], strict=True))
            pulls = [line.pull(raw(part), lead, tag) for lead, part in told.items()]
            yield from until(*requests, *pulls)
            told[line.rank] = yield from self._added(parts)
            for lead in lone:
                told[lead] = yield from self._added({lead: told[lead]})
            data.copy_(summed([told[lead] for lead in leads]))
        others = [lead for lead in leads if lead != line.rank]
        yield from self._spread(data, [*others, *self._near()], tag)

    def _near(self) -> list[int]:
        """Return the other ranks of my node."""
        return [rank for rank in self._line.tiers.near if rank != self._line.rank]

    @contextmanager
    def _gathered(
        self, data: Tensor, tag: int
    ) -> Iterator[tuple[dict[int, Tensor], list[Request]]]:
        """Lend the parts of my node, by rank in rank order, mine included, and what brings them."""
        line, others = self._line, self._near()
        with self._scratch.lend(len(others), data) as blocks:
            parts = {**dict(zip(others, blocks, strict=True)), line.rank: data}
            requests = [line.pull(raw(parts[rank]), rank, tag) for rank in others]
            yield {rank: parts[rank] for rank in line.tiers.near}, requests

    def _added(self, parts: Mapping[int, Tensor]) -> Generator[None, None, Tensor]:
        """Return the weighted sum of parts; may overwrite them."""
        while self._weights is None:
            yield
        return total(list(parts.values()), [self._weights[rank] for rank in parts])

    def _spread(self, data: Tensor, ranks: Sequence[int], tag: int) -> Steps:
        yield from until(*[self._line.push(raw(data), r, tag, self._counted) for r in ranks])

    @contextmanager
    def _packed(self, piece: Piece) -> Iterator[Tensor]:
        """Lend one span of memory that holds the piece, and put its new content back at the end."""
        if len(piece) == 1:
            yield piece[0]
            return
        ends = list(accumulate(span.numel() for span in piece))
        with self._scratch.lend(1, piece[0].new_empty(ends[-1])) as (data,):
            torch.cat(piece, out=data)
            yield data
            for span, end in zip(piece, ends, strict=True):
                span.copy_(data[end - span.numel() : end])


def total(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of weight x part in the order given; may overwrite the parts.

    Products and sums are separate operations: a fused one would round differently in the vector
    body and in the tail of a loop, and so depend on how the tensors were cut.
    """
    dtype = SUMS[parts[0].dtype]
    return summed(
        part.to(dtype) if w == 1 else part.to(dtype).mul_(w)
        for part, w in zip(parts, weights, strict=True)
    )


def summed(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum in the order given, in the memory of the first."""
    rest = iter(terms)
    result = next(rest)
    for term in rest:
        result.add_(term)
    return result


def cut(flats: Sequence[Tensor], size: int) -> list[Piece]:
    """Cut 1-D tensors into pieces of at most 1 MiB of one dtype, as many for each of `size` ranks.

    Where there is too little data for all ranks there are fewer pieces.
    """
    dtypes = dict.fromkeys(flat.dtype for flat in flats)
    groups = [[flat for flat in flats if flat.dtype == dtype] for dtype in dtypes]
    return [piece for group in groups for piece in _cut(group, size)]


def _cut(flats: list[Tensor], size: int) -> list[Piece]:
    payload = sum(flat.nbytes for flat in flats)
    least = -(-payload // PIECE_BYTES)
    even = -(-least // size) * size
    count = max(1, min(even, max(least, payload // ENOUGH_BYTES)))
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


def _check(tensors: Sequence[Tensor]) -> None:
    """Refuse what has no mean, or cannot be overwritten."""
    for number, tensor in enumerate(tensors):
        dense(tensor, "mean_", number)
        if tensor.dtype not in SUMS:
            legal = ", ".join(str(dtype) for dtype in SUMS)
            raise TypeError(
                f"mean_ of {tensor.dtype} (tensor {number}, shape {tuple(tensor.shape)}): "
                f"means are made of {legal}"
            )
    apart(tensors, "mean_")
