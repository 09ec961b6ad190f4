"""Memory that a rank and its worker processes map.

Invariant: the memory has no name in any file system, so nothing is left of it when its processes
are killed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from dtrain.data.conversion import Array

ALIGNMENT = 64


class TensorPlace(NamedTuple):
    """Place of a tensor in shared memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@final
class SharedMemory:
    """Memory that grows, mapped by each process that has its file descriptor.

    Parameters
    ----------
    file_descriptor : int, optional
        That of another process; default: new memory.

    Attributes
    ----------
    file_descriptor : int
        Child processes inherit it where it is passed to them.
    """

    def __init__(self, file_descriptor: int | None = None) -> None:
        self.file_descriptor = _new_file() if file_descriptor is None else file_descriptor
        self._map: mmap.mmap | None = None

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array at the start of the memory, which grows if needed."""
        count = int(np.prod(shape, dtype=np.int64))
        memory = self._mapped(count * dtype.itemsize)
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def write(self, tensors: Sequence[Tensor]) -> list[TensorPlace]:
        """Copy tensors into the memory; return their places."""
        places, offset = [], 0
        for tensor in tensors:
            places.append(TensorPlace(tensor.dtype, tuple(tensor.shape), offset))
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        memory = self._mapped(offset)
        for tensor, place in zip(tensors, places, strict=True):
            if tensor.numel():
                _view(memory, place).copy_(tensor)
        return places

    def read(self, places: Sequence[TensorPlace]) -> list[Tensor]:
        """Return copies of the tensors at their places."""
        sizes = [
            place.offset + int(np.prod(place.shape)) * place.dtype.itemsize for place in places
        ]
        memory = self._mapped(max(sizes, default=0))
        return [
            _view(memory, place).clone() if 0 not in place.shape else torch.empty(place.shape)
            for place in places
        ]

    def close(self) -> None:
        """Close the file; arrays remain valid."""
        os.close(self.file_descriptor)

    def _mapped(self, size: int) -> mmap.mmap:
        """Return a map of at least `size` bytes."""
        if self._map is None or len(self._map) < size:
            size = max(size, mmap.PAGESIZE, os.fstat(self.file_descriptor).st_size)
            os.ftruncate(self.file_descriptor, size)
            self._map = mmap.mmap(self.file_descriptor, size)
        return self._map


def _view(memory: mmap.mmap, place: TensorPlace) -> Tensor:
    count = int(np.prod(place.shape, dtype=np.int64))
    flat = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset)
    return flat.view(place.shape)


def _new_file() -> int:
    """Return the descriptor of a new file in memory, without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("dtrain", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
