"""Exact sums and sums of squares of small integers, by channel.

Invariant: every intermediate result is an integer that its dtype holds exactly, so neither order
nor pieces change a sum. float32 holds a sum of 256 squares of bytes: 256 x 255^2 < 2^24.

::

    (outer, channels, inner)     inner long:   sum runs of 256 numbers of a channel
                                 inner short:  add 256 rows, then fold what belongs to a channel
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.data.conversion import Array

Int64s = NDArray[np.int64]

EXACT_TERMS = 256
"""Numbers whose squares are added in floating point before an integer takes the sum."""


BLOCK = 2**20
"""Numbers that are converted at once: they stay in the cache."""


SHORT_RUN = 32
"""Shortest run of neighbouring numbers of one channel that is summed as a run."""


ROW_NUMBERS = 1024
"""Numbers of a row in the sums over rows."""


def has_exact_sums(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is one of integers of at most 16 bits."""
    return dtype.kind in "iu" and dtype.itemsize <= 2


def exact_sums(x: Array) -> Int64s:
    """Return sum and sum of squares, (2, channels), of integers (outer, channels, inner)."""
    sums = np.zeros((2, x.shape[1]), np.int64)
    if x.shape[2] < SHORT_RUN:
        _add_rows(x, sums)
        return sums
    whole = x.shape[2] - x.shape[2] % EXACT_TERMS
    for runs in (x[:, :, :whole], x[:, :, whole:]):
        if runs.size:
            _add_runs(runs, sums)
    return sums


def _float_dtype(x: Array) -> Any:
    return np.float32 if x.dtype.itemsize == 1 else np.float64


def _add_runs(x: Array, sums: Int64s) -> None:
    """Add sums over runs of at most `EXACT_TERMS` numbers, which are a whole share of `inner`."""
    outer, channels, inner = x.shape
    run = min(inner, EXACT_TERMS)
    ones, buffer = np.ones(run, _float_dtype(x)), np.empty(BLOCK, _float_dtype(x))
    samples = max(1, BLOCK // (channels * inner))
    group = channels if channels * inner <= BLOCK else max(1, BLOCK // inner)
    length = min(inner, BLOCK)
    for start in range(0, outer, samples):
        for first in range(0, channels, group):
            for left in range(0, inner, length):
                part = x[start : start + samples, first : first + group, left : left + length]
                numbers = buffer[: part.size]
                numbers.reshape(part.shape)[...] = part
                target = sums[:, first : first + group]
                shape, runs = (*part.shape[:2], -1), numbers.reshape(-1, run)
                target[0] += _whole((runs @ ones).reshape(shape))
                target[1] += _whole(np.einsum("ij,ij->i", runs, runs).reshape(shape))


def _whole(sums: Array) -> Int64s:
    """Return sums of (outer, channels, runs) over the first and the last dimension."""
    whole: Int64s = sums.sum(axis=(0, 2), dtype=np.float64).astype(np.int64)
    return whole


def _add_rows(x: Array, sums: Int64s) -> None:
    """Add sums over rows, of several samples or positions each where they are short."""
    outer, channels, inner = x.shape
    width = channels * inner
    joined = max(1, ROW_NUMBERS // width)
    whole = outer - outer % joined
    for rows in (x[:whole].reshape(-1, joined * width), x[whole:].reshape(-1, width)):
        for left in range(0, rows.shape[1] if len(rows) else 0, ROW_NUMBERS):
            columns = _column_sums(rows[:, left : left + ROW_NUMBERS])
            channel = np.arange(left, left + columns.shape[1]) % width // inner
            for target, column in zip(sums, columns, strict=True):
                np.add.at(target, channel, column)


def _column_sums(rows: Array) -> Int64s:
    """Return sum and sum of squares of each column, (2, columns)."""
    sums = np.zeros((2, rows.shape[1]), np.int64)
    ones = np.ones(EXACT_TERMS, _float_dtype(rows))
    buffer = np.empty((EXACT_TERMS, rows.shape[1]), _float_dtype(rows))
    for start in range(0, len(rows), EXACT_TERMS):
        part = rows[start : start + EXACT_TERMS]
        numbers = buffer[: len(part)]
        numbers[...] = part
        sums[0] += (ones[: len(part)] @ numbers).astype(np.int64)
        np.multiply(numbers, numbers, out=numbers)
        sums[1] += (ones[: len(part)] @ numbers).astype(np.int64)
    return sums
