"""An object that is sent to several processes, which share the memory of its large arrays.

Invariant: the object that a process gets may be written to, and no other process sees the change. A
part of an array is copied for a process when it writes to it.

::

    memory   | pickled object | first array | second array | ...      mapped by each process
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from dtrain.data.conversion import ALIGNMENT, Array
from dtrain.data.reading.worker_memory import WorkerMemory

LARGE_BYTES = 2**16
"""Smaller arrays are parts of the pickled object."""


@final
class SharedPickle:
    """A pickled object in shared memory.

    Parameters
    ----------
    value : object
        It is pickled; a memory map of numpy by the name of its file.

    Attributes
    ----------
    pickled : bytes
        The object without its large arrays.
    sizes : tuple of int
        Bytes of the pickled object and of each large array.
    memory : WorkerMemory
        They lie one after another in it.

    Raises
    ------
    pickle.PicklingError, AttributeError, TypeError
        It cannot be pickled.
    """

    def __init__(self, value: object) -> None:
        file, buffers = io.BytesIO(), list[Array]()

        def is_small(buffer: pickle.PickleBuffer) -> bool:
            content = np.frombuffer(buffer.raw(), np.uint8)
            if content.nbytes >= LARGE_BYTES:
                buffers.append(content)
            return content.nbytes < LARGE_BYTES

        _Pickler(file, 5, buffer_callback=is_small).dump(value)
        self.pickled = file.getvalue()
        contents = [np.frombuffer(self.pickled, np.uint8), *buffers]
        self.sizes = tuple(content.nbytes for content in contents)
        self.memory = WorkerMemory()
        memory = self.memory.array((_stop(self.sizes),), np.dtype(np.uint8))
        for content, place in zip(contents, _places(self.sizes), strict=True):
            memory[place] = content


def load_shared(file_descriptor: int, sizes: Sequence[int]) -> Any:
    """Return the object of a `SharedPickle`; the file is closed."""
    memory = memoryview(mmap.mmap(file_descriptor, _stop(sizes), access=mmap.ACCESS_COPY))
    os.close(file_descriptor)
    pickled, *buffers = (memory[place] for place in _places(sizes))
    return pickle.loads(pickled, buffers=buffers)


class _Pickler(pickle.Pickler):
    """Pickles tensors by their arrays, and memory maps by their files."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is np.memmap and value.filename is not None and value.flags.c_contiguous:
            return np.memmap, _memory_map_arguments(value)
        if type(value) is not Tensor or value.layout != torch.strided or value.is_quantized:
            return NotImplemented
        if value.nbytes < LARGE_BYTES:
            return NotImplemented
        try:
            return torch.from_numpy, (value.numpy(),)
        except (TypeError, RuntimeError):  # another device or dtype, or it has a gradient
            return NotImplemented


def _memory_map_arguments(array: np.memmap[Any, Any]) -> tuple[Any, ...]:
    """Return the arguments that map the same bytes of the file again."""
    start = np.frombuffer(array._mmap, np.uint8).ctypes.data  # type: ignore[attr-defined]
    file_start = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    mode = "r+" if array.mode == "w+" else array.mode
    path = os.path.abspath(array.filename or "")
    return path, array.dtype, mode, array.ctypes.data - start + file_start, array.shape


def _places(sizes: Sequence[int]) -> Iterator[slice]:
    """Yield the place of each part, aligned."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += -(-size // ALIGNMENT) * ALIGNMENT


def _stop(sizes: Sequence[int]) -> int:
    last: slice = list(_places(sizes))[-1]
    return int(last.stop)
