"""Memory: aligned tensors, their bytes, and scratch that is kept.

Invariant: what is received starts on a 64-byte boundary, because matrix products change their last
bits with the alignment of their inputs, and n ranks must compute what one rank computes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from dtrain.comm.backends.base import Bytes

ALIGN_BYTES = 64


def aligned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return fresh, uninitialised memory on the CPU that starts on a 64-byte boundary."""
    count = math.prod(shape) * dtype.itemsize
    block = torch.empty(count + ALIGN_BYTES - 1, dtype=torch.uint8)
    start = -block.data_ptr() % ALIGN_BYTES
    return block[start : start + count].view(dtype).view(tuple(shape))


def as_bytes(tensor: Tensor) -> Bytes:
    """Return the bytes of a contiguous tensor on the CPU: the same memory, no copy."""
    data: Bytes = tensor.detach().view(-1).view(torch.uint8).numpy()
    return data


def describe_tensor(tensor: Tensor) -> str:
    """Return shape and dtype, for people."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@final
class BufferPool:
    """Buffers that are used again and again: fresh pages cost as much as a copy.

    Parameters
    ----------
    size_bytes : int
        Buffers are multiples of this, and kept apart by their size.
    """

    def __init__(self, unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    @contextmanager
    def lend(
        self, count: int, like: Tensor, dtype: torch.dtype | None = None
    ) -> Iterator[list[Tensor]]:
        """Lend `count` buffers shaped as the 1-D tensor `like`, and typed so unless `dtype` says
        otherwise, until the block ends."""
        kind = like.dtype if dtype is None else dtype
        size_bytes = like.numel() * kind.itemsize
        units = max(1, -(-size_bytes // self._unit_bytes))
        free = self._free[units]
        while len(free) < count:
            free.append(aligned_empty((units * self._unit_bytes,), torch.uint8))
        blocks = [free.pop() for _ in range(count)]
        try:
            yield [block[:size_bytes].view(kind) for block in blocks]
        finally:
            free.extend(blocks)
