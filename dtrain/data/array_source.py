"""Sources of rows: one stored array (n, ...) each, in memory or in a file, read by index.

Invariant: a read depends only on its indices, never on earlier reads, and returns new memory.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import ArrayLike

from dtrain.data.conversion import Array
from dtrain.errors import DataError


class ArrayForm(Protocol):
    """The form of an array (n, ...) that may lie in a file: rows first."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...

    def __len__(self) -> int: ...


class ArraySource(ABC):
    """The rows of one stored array.

    A source is sent to other processes as it is made, without what it has read: a subclass that
    opens files leaves them out of its state.

    Attributes
    ----------
    shape : tuple of int
        (n, ...): rows first.
    dtype : numpy.dtype
        Dtype of the stored numbers.
    location : str
        File and name, or name of a user's function, for messages.
    chunk_rows : int or None
        Rows of a stored piece that is read as a whole; None where each row is read by itself.
    compressed : bool
        Whether a stored piece must be decoded for each read of one of its rows.
    in_memory : bool
        Whether rows lie in memory or in a memory map.
    by_item : bool
        Whether a user's code makes each row; then the rows are never read as a whole.
    is_lazy : bool
        Whether all rows are read into memory on first need.
    is_mapped : bool
        Whether rows lie in a mapped file, whose pages all ranks of a node share.
    repeats : bool
        Whether rows share memory, so that they take less of it than `nbytes`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    location: str
    chunk_rows: int | None = None
    compressed: bool = False
    in_memory: bool = False
    by_item: bool = False
    is_lazy: bool = False
    is_mapped: bool = False
    repeats: bool = False

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of dimensions, those of the rows included."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows when they are read."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes that the rows take where they are."""
        return self.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @abstractmethod
    def read(self, indices: ArrayLike) -> Array:
        """Return the rows at `indices`, in their order, as a new array (k, ...).

        Raises
        ------
        DataError
            The rows cannot be read.
        """

    @abstractmethod
    def read_range(self, start: int, stop: int) -> Array:
        """Return the rows from `start` to before `stop`; the caller must not write to them.

        Raises
        ------
        DataError
            The rows cannot be read.
        """

    def read_into(self, rows: Array, start: int) -> None:
        """Read as many rows as `rows` has, from `start` on, into it.

        Raises
        ------
        DataError
            The rows cannot be read.
        """
        rows[...] = self.read_range(start, start + len(rows))

    def close(self) -> None:  # noqa: B027
        """Close the files that reads have opened; a later read opens them again."""


@final
class MemorySource(ArraySource):
    """An array in memory, or a memory map.

    Parameters
    ----------
    array : array
        It is not copied.
    location : str
        As in `ArraySource`.
    of_node : bool
        Whether all ranks of a node share the memory; then it is read-only.
    """

    in_memory = True

    def __init__(self, array: Array, location: str = "an array", *, of_node: bool = False) -> None:
        if of_node:
            array.flags.writeable = False
        self.array, self.of_node = array, of_node
        self.is_mapped = not of_node and _is_memory_map(array)
        self.shape, self.dtype, self.location = tuple(array.shape), array.dtype, location

    def read(self, indices: ArrayLike) -> Array:
        rows: Array = self.array[np.asarray(indices)]
        return rows

    def read_range(self, start: int, stop: int) -> Array:
        return self.array[start:stop]


@final
class LazySource(ArraySource):
    """An array that a function returns on first need.

    Parameters
    ----------
    shape, dtype, location
        As in `ArraySource`: known before anything is read.
    load : callable
        Returns the array.
    """

    in_memory = is_lazy = True

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, load: Callable[[], Array], location: str
    ) -> None:
        self.shape, self.dtype, self.location = shape, np.dtype(dtype), location
        self._load = load

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_array"}

    def close(self) -> None:
        self.__dict__.pop("_array", None)

    @cached_property
    def _array(self) -> Array:
        return self._load()

    def read(self, indices: ArrayLike) -> Array:
        rows: Array = self._array[np.asarray(indices)]
        return rows

    def read_range(self, start: int, stop: int) -> Array:
        return self._array[start:stop]


@final
class ConcatenatedSource(ArraySource):
    """Several sources as one, their rows one after another.

    Parameters
    ----------
    parts : sequence of ArraySource
        At least one; rows of equal shape and dtype.
    location : str
        As in `ArraySource`.

    Raises
    ------
    DataError
        Shape or dtype of rows differ.
    """

    def __init__(self, parts: Sequence[ArraySource], location: str) -> None:
        first, self.parts, self.location = parts[0], tuple(parts), location
        for part in parts:
            if (part.shape[1:], part.dtype) != (first.shape[1:], first.dtype):
                raise DataError(
                    "data.parts-differ",
                    f"{part.location} has samples of shape {part.shape[1:]} and dtype {part.dtype},"
                    f" {first.location} of {first.shape[1:]} and {first.dtype}: make them equal",
                )
        self._stops = list(accumulate(len(part) for part in parts))
        self.shape, self.dtype = (self._stops[-1], *first.shape[1:]), first.dtype
        self.chunk_rows = next((part.chunk_rows for part in parts if part.chunk_rows), None)
        self.compressed = any(part.compressed for part in parts)
        self.in_memory = all(part.in_memory for part in parts)
        self.is_lazy = any(part.is_lazy for part in parts)
        self.is_mapped = all(part.is_mapped for part in parts)
        self.repeats = any(part.repeats for part in parts)

    @property
    def stored_bytes(self) -> int:
        return sum(part.stored_bytes for part in self.parts)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def read(self, indices: ArrayLike) -> Array:
        order = np.asarray(indices)
        result = np.empty((len(order), *self.shape[1:]), self.dtype)
        numbers = np.searchsorted(self._stops, order, side="right")
        for number in np.unique(numbers):
            rows = np.flatnonzero(numbers == number)
            start = self._stops[number] - len(self.parts[number])
            result[rows] = self.parts[number].read(order[rows] - start)
        return result

    def read_range(self, start: int, stop: int) -> Array:
        pieces = []
        for number in range(bisect_right(self._stops, start), len(self.parts)):
            first = self._stops[number] - len(self.parts[number])
            if first >= stop:
                break
            low, high = max(start - first, 0), min(stop - first, len(self.parts[number]))
            pieces.append(self.parts[number].read_range(low, high))
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), self.dtype)


def _is_memory_map(array: Array) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return isinstance(base, mmap.mmap)
