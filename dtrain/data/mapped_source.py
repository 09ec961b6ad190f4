"""Rows that lie in a file one after another, read through a memory map.

Invariant: the file is only read. All ranks of a node share the pages of the file that are in
memory.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import ArrayLike

from dtrain.data.array_source import ArraySource
from dtrain.data.conversion import Array
from dtrain.data.memory_limits import fits_in_memory
from dtrain.errors import DataError


@final
class MappedSource(ArraySource):
    """An array in a file.

    Parameters
    ----------
    path : Path
        The file.
    offset : int
        Byte at which the numbers start.
    shape, dtype, location
        As in `ArraySource`.
    is_fortran : bool
        Whether the first index varies fastest, so that a row does not lie in one piece.

    Raises
    ------
    DataError
        The file is too short.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        location: str,
        *,
        is_fortran: bool = False,
    ) -> None:
        self.path, self.offset, self.is_fortran = path, offset, is_fortran
        self.shape, self.dtype, self.location = shape, dtype, location
        self.is_mapped = not is_fortran
        missing = offset + self.nbytes - path.stat().st_size
        if missing > 0:
            raise DataError(
                "data.file-damaged",
                f"{path} lacks {missing} bytes of {location}: copy the file again",
            )

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_rows", "in_memory")
        }

    @cached_property
    def in_memory(self) -> bool:  # type: ignore[override]
        """Whether the pages of the file fit in memory, and a row lies in one piece."""
        return not self.is_fortran and fits_in_memory(self.nbytes)

    @cached_property
    def _rows(self) -> Array:
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        order: Literal["C", "F"] = "F" if self.is_fortran else "C"
        try:
            mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)
        except OSError as error:
            raise DataError(
                "data.file-unreadable", f"cannot read {self.path} ({error}): copy it again"
            ) from error
        rows: Array = mapped.view(np.ndarray)
        return rows

    def close(self) -> None:
        self.__dict__.pop("_rows", None)

    def read(self, indices: ArrayLike) -> Array:
        return np.ascontiguousarray(self._rows[np.asarray(indices, np.int64)])

    def read_range(self, start: int, stop: int) -> Array:
        rows: Array = np.require(self._rows[start:stop], requirements=["C", "A"])
        return rows
