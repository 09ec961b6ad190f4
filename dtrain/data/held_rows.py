"""A source of rows of which some groups are in memory.

Invariant: a read returns the same rows whether they are in memory or not.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dtrain.data.array_source import ArraySource
from dtrain.data.conversion import Array


@final
@dataclass(eq=False)
class RowGroup:
    """Rows that are read at once.

    Attributes
    ----------
    indices : array of int
        The rows, each once, in ascending order.
    loaded : Future
        Done when `rows` is there.
    rows : array or None
        The stored rows (k, ...), None before and after.
    buffer : int
        Number of the buffer that holds the rows.
    """

    indices: NDArray[np.int64]
    loaded: Future[None] = field(default_factory=Future)
    rows: Array | None = None
    buffer: int = 0


@final
class HeldRows(ArraySource):
    """Another source, of which some groups of rows are in memory.

    Groups may be added and removed in one thread while another one reads.

    Parameters
    ----------
    source : ArraySource
        It is read for rows that are in no group. It is not sent to other processes.
    """

    def __init__(self, source: ArraySource) -> None:
        self.shape, self.dtype, self.location = source.shape, source.dtype, source.location
        self.chunk_rows, self.compressed = source.chunk_rows, source.compressed
        self.source = source
        self._groups: tuple[RowGroup, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": None, "_groups": ()}

    def hold(self, group: RowGroup) -> None:
        """Read from the rows of a group."""
        self._groups = (*self._groups, group)

    def release(self, group: RowGroup) -> None:
        """Forget a group."""
        self._groups = tuple(other for other in self._groups if other is not group)

    def release_all(self) -> None:
        """Forget all groups."""
        self._groups = ()

    def read(self, indices: ArrayLike) -> Array:
        order = np.asarray(indices)
        groups = self._groups
        missing = np.ones(len(order), bool)
        result: Array | None = None
        for group in groups:
            assert group.rows is not None
            positions = np.searchsorted(group.indices, order)
            np.minimum(positions, len(group.indices) - 1, out=positions)
            found = missing & (group.indices[positions] == order)
            if found.all():
                rows: Array = group.rows.take(positions, axis=0)
                return rows
            if found.any():
                result = self._empty(len(order)) if result is None else result
                result[found] = group.rows[positions[found]]
                missing &= ~found
        if result is None:
            return self.source.read(order)
        if missing.any():
            result[missing] = self.source.read(order[missing])
        return result

    def read_range(self, start: int, stop: int) -> Array:
        return self.source.read_range(start, stop)

    def _empty(self, count: int) -> Array:
        return np.empty((count, *self.shape[1:]), self.dtype)
