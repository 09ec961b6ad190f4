"""Check that a data set is a function of its indices: some samples are read twice.

::

    first read     0 3 6 9                one after another
    second reads   10 9 7 6   4 3 1 0     the other way round, with their neighbours, in two parts

Invariant: nothing is kept; a split that is slow is checked as far as the deadline allows, at least
two samples of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtrain.data.dataset import Dataset, DatasetView
from dtrain.data.statistics import unstandardised
from dtrain.errors import DataError

Indices = NDArray[np.int64]


SAMPLES = 8
"""Samples of a split that are read twice."""


ROUNDING = 1e-5
"""Difference of two reads that rounding explains, relative to the largest number of a sample: a
data set may compute on whole micro-batches."""


def check_repeatable(split: Dataset, name: str, reads_inputs: bool, deadline: float) -> None:
    """Refuse a split whose samples or targets differ when they are read again.

    Parameters
    ----------
    name : str
        Name of the split, for the message: "train".
    reads_inputs : bool
        Whether inputs are read, or targets alone.
    deadline : float
        The time of `time.monotonic` after which no further samples are read.

    Raises
    ------
    DataError
        It names split and sample.
    """
    stored = unstandardised(split)
    readers: list[tuple[str, Callable[[Indices], Sequence[Tensor]]]] = [
        ("target", lambda rows: (stored.targets(rows),))
    ]
    if reads_inputs:
        readers += [
            ("input", lambda rows: (stored.inputs(rows),)),
            ("further input", stored.read_other_inputs),
        ]
    chosen = np.unique(np.linspace(0, split.size - 1, SAMPLES).astype(np.int64))
    for rows in _parts(chosen, deadline):
        for part, read in readers:
            _compare(split, name, part, rows, read)


def _parts(rows: Indices, deadline: float) -> Iterator[Indices]:
    """Yield the rows in parts: the first and the last one, then the others until the deadline."""
    yield rows[[0, -1]] if len(rows) > 1 else rows
    if len(rows) > 2 and time.monotonic() < deadline:
        yield rows[1:-1]


def _compare(
    split: Dataset,
    name: str,
    part: str,
    rows: Indices,
    read: Callable[[Indices], Sequence[Tensor]],
) -> None:
    """Read rows twice, the second time in another order and with others, and compare."""
    first = read(rows)
    again = np.unique(np.append(rows, np.minimum(rows + 1, split.size - 1)))[::-1]
    halves = [half for half in np.array_split(again, 2) if len(half)]
    second = [read(half) for half in halves]
    for position, row in enumerate(rows):
        number, place = next(
            (number, int(np.flatnonzero(half == row)[0]))
            for number, half in enumerate(halves)
            if row in half
        )
        for before, after in zip(first, second[number], strict=True):
            if not _is_same(before[position], after[place]):
                raise DataError(
                    "data.not-repeatable",
                    f"the {part} of sample {row} of the {name} split differs when it is read again "
                    f"(it comes from {_source(split)}): read samples by their index alone; random "
                    "changes of training samples belong into a function that [data] augment names",
                )


def _is_same(before: Tensor, after: Tensor) -> bool:
    """Return whether two samples have the same shape, dtype and numbers, up to rounding."""
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        return False
    if not (before.is_floating_point() or before.is_complex()):
        return bool((before == after).all())
    scale = float(before.nan_to_num(0.0, 0.0, 0.0).abs().max()) if before.numel() else 0.0
    return torch.allclose(before, after, rtol=0.0, atol=ROUNDING * scale, equal_nan=True)


def _source(split: Dataset) -> str:
    """Return the class of the data set that views are of."""
    while isinstance(split, DatasetView):
        split = split._dataset
    return type(split).__name__
