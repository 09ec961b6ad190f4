"""Windows over the steps of a text or a series, as the rows of a source.

Invariant: a window depends on its index alone. Windows that overlap share memory, so a source takes
less of it than `nbytes` says, and is never held a second time.
"""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import ArrayLike

from dtrain.data.array_source import ArraySource
from dtrain.data.conversion import Array


@final
class WindowSource(ArraySource):
    """Windows of equal length, at equal distances.

    ::

        steps     0 1 2 3 4 5 6 7 8 9         first = 1, length = 3, stride = 2, count = 4
        windows     1 2 3
                        3 4 5   ...

    Parameters
    ----------
    steps : ArraySource
        The steps (T,) or (T, channels).
    first, length, stride, count : int
        First step of window 0; steps of each; from one window to the next; number of windows.
    counts_bytes : bool
        Whether the bytes of the steps are counted here, and not for another source of them.
    """

    repeats = True

    def __init__(
        self,
        steps: ArraySource,
        first: int,
        length: int,
        stride: int,
        count: int,
        *,
        counts_bytes: bool = True,
    ) -> None:
        self.steps, self.first, self.length, self.stride = steps, first, length, stride
        self.shape = (count, length, *steps.shape[1:])
        self.dtype, self.location = steps.dtype, steps.location
        self._counts_bytes = counts_bytes
        self.is_lazy, self.is_mapped = steps.is_lazy, steps.is_mapped

    @property
    def in_memory(self) -> bool:  # type: ignore[override]
        """Whether the steps lie in memory or in a memory map."""
        return self.steps.in_memory

    @property
    def stored_bytes(self) -> int:
        span = self.length + self.stride * (len(self) - 1)
        return span * self.steps.row_bytes if self._counts_bytes else 0

    def close(self) -> None:
        self.steps.close()

    def read(self, indices: ArrayLike) -> Array:
        starts = self.first + self.stride * np.asarray(indices, np.int64)
        places = starts[:, None] + np.arange(self.length)
        rows: Array = self.steps.read(places.ravel())
        return rows.reshape(len(starts), *self.shape[1:])

    def read_range(self, start: int, stop: int) -> Array:
        return self.read(np.arange(start, min(stop, len(self))))
