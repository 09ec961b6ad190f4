"""Mean: reduce-scatter and all-gather over point-to-point, in a stated order of summation.

Invariant: rank `k mod size` owns piece k, adds the ranks' parts in rank order and sends the result
to all; so all ranks hold the same bits, and exactly 2 (size - 1) times the payload is sent in all.

    the tensors of one dtype, end to end, cut into equal pieces of at most 1 MiB
    +--------- t0 ----------+- t1 -+------- t2 -------+
    | piece 0 | piece 1 | piece 2  | piece 3 | piece 4 |      pieces inside one tensor are views,
    +---------+---------+----------+---------+---------+      others are packed

    lane 0: piece 0, piece 4, ...     a lane takes its pieces one after the other and has a tag of
    lane 1: piece 1, ...              its own; lanes run beside each other
    lane 2: piece 2, ...
    lane 3: piece 3, ...

    one piece, 3 ranks, owner 1:   0 --w0,t0--> 1 <--t2,w2-- 2   then   0 <--mean-- 1 --mean--> 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtrain.comm.line import Line
from dtrain.comm.memory import Scratch, raw
from dtrain.comm.tree import Steps, until
from dtrain.comm.wire import Request

PIECE_BYTES = 1 << 20
ENOUGH_BYTES = 1 << 14
"""Smaller pieces cost more in messages than they save in work."""

LANES = 4
MOST_LANES = 62
"""A collective has 64 tags: one per lane, one for the weights."""

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
        wait: Callable[[Callable[[], bool], str], None],
    ) -> None:
        self._line, self._tag, self._scratch, self._wait = line, tag, scratch, wait
        self._counted = line.traffic.on
        self._tensors, self._flats = tensors, _flat(tensors)
        self._pieces = cut(self._flats, line.size)
        self._width = min(max(LANES, line.size), MOST_LANES, len(self._pieces))
        self._weights: list[float] | None = None
        lanes = (self._lane(lane) for lane in range(self._width))
        self._lanes = [self._share(np.array([weight])), *lanes]
        self._over = False

    def test(self) -> bool:
        """Go on as far as possible; return whether the tensors hold the mean."""
        if self._over:
            return True
        self._lanes = [lane for lane in self._lanes if next(lane, self) is not self]
        if not self._lanes:
            _unflat(self._tensors, self._flats)
            self._over = True
        return self._over

    def wait(self) -> None:
        """Return when the tensors hold the mean."""
        self._wait(self.test, f"a mean of {len(self._tensors)} tensors")

    def _lane(self, lane: int) -> Iterator[None]:
        for number in range(lane, len(self._pieces), self._width):
            owner = number % self._line.size
            work = self._own if owner == self._line.rank else self._lend
            with self._packed(self._pieces[number]) as data:
                yield from work(data, owner, self._tag + lane)

    def _share(self, mine: npt.NDArray[np.float64]) -> Steps:
        """Tell the owners my weight; as an owner, learn those of all."""
        line, tag = self._line, self._tag + MOST_LANES
        owners = range(min(line.size, len(self._pieces)))
        weights = np.zeros((line.size, 1))
        weights[line.rank] = mine
        learnt, told = [], []
        for rank in line.others():
            if line.rank in owners:
                learnt.append(line.pull(weights[rank].view(np.uint8), rank, tag))
            if rank in owners:
                told.append(line.push(mine.view(np.uint8), rank, tag, False))
        yield from until(*learnt)
        self._weights = weights[:, 0].tolist()
        yield from until(*told)

    def _lend(self, data: Tensor, owner: int, tag: int) -> Steps:
        """Send my part to its owner; the mean comes back into the same memory."""
        yield from until(self._line.push(raw(data), owner, tag, self._counted))
        yield from until(self._line.pull(raw(data), owner, tag))

    def _own(self, data: Tensor, owner: int, tag: int) -> Steps:
        """Add the parts of all ranks to mine and send the mean to all."""
        line, others = self._line, self._line.others()
        with self._scratch.lend(len(others), data) as blocks:
            parts = dict(zip(others, blocks, strict=True))
            yield from until(*[line.pull(raw(part), rank, tag) for rank, part in parts.items()])
            while self._weights is None:
                yield
            parts[owner] = data
            data.copy_(total([parts[rank] for rank in range(line.size)], self._weights))
        yield from until(*[line.push(raw(data), rank, tag, self._counted) for rank in others])

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
    scaled = (
        part.to(dtype) if w == 1 else part.to(dtype).mul_(w)
        for part, w in zip(parts, weights, strict=True)
    )
    result = next(scaled)
    for part in scaled:
        result.add_(part)
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


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    for number, tensor in enumerate(tensors):
        if tensor.dtype not in SUMS:
            legal = ", ".join(str(dtype) for dtype in SUMS)
            raise TypeError(
                f"mean_ of {tensor.dtype} (tensor {number}, shape {tuple(tensor.shape)}): "
                f"means are made of {legal}"
            )
    return [tensor.detach().contiguous().view(-1) for tensor in tensors]


def _unflat(tensors: Sequence[Tensor], flats: Sequence[Tensor]) -> None:
    for tensor, flat in zip(tensors, flats, strict=True):
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.shape))
