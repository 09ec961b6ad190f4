"""Memory of messages: aligned tensors, their bytes, and a pool of buffers that are used again.

Invariant: a received tensor starts on a 64-byte boundary, because matrix products change their last
bits with the alignment of their inputs, and n ranks must compute the same bits as one rank.
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

TensorSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


ALIGN_BYTES = 64


def aligned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return fresh, uninitialised memory on the CPU that starts on a 64-byte boundary."""
    size_bytes = math.prod(shape) * dtype.itemsize
    memory = torch.empty(size_bytes + ALIGN_BYTES - 1, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGN_BYTES
    return memory[start : start + size_bytes].view(dtype).view(tuple(shape))


def as_bytes(tensor: Tensor) -> Bytes:
    """Return the bytes of a contiguous tensor on the CPU: the same memory, no copy."""
    data: Bytes = tensor.detach().view(-1).view(torch.uint8).numpy()
    return data


def describe_tensor(tensor: Tensor) -> str:
    """Return shape and dtype as text."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@final
class BufferPool:
    """Buffers that are used again and again: fresh pages cost as much as a copy.

    Parameters
    ----------
    unit_bytes : int
        The size of a buffer is a multiple of this; free buffers are kept by size.
    """

    def __init__(self, unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    @contextmanager
    def lend(
        self, count: int, like: Tensor, dtype: torch.dtype | None = None
    ) -> Iterator[list[Tensor]]:
        """Yield `count` buffers of the shape of the 1-D tensor `like`, and of its dtype if `dtype`
        is None; take them back at the end of the block."""
        dtype = like.dtype if dtype is None else dtype
        size_bytes = like.numel() * dtype.itemsize
        units = max(1, -(-size_bytes // self._unit_bytes))
        free = self._free[units]
        while len(free) < count:
            free.append(aligned_empty((units * self._unit_bytes,), torch.uint8))
        buffers = [free.pop() for _ in range(count)]
        try:
            yield [buffer[:size_bytes].view(dtype) for buffer in buffers]
        finally:
            free.extend(buffers)
