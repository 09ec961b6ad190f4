"""Values that spoil a training: numbers that are not finite, and targets that are all alike.

Invariant: a check reads samples in their order and stops at its deadline, so that it never delays a
start by much. Nothing is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.data.dataset import Dataset, Subset
from dtrain.data.statistics import NotFinite, Standardised, unstandardised
from dtrain.errors import DataError

Indices = NDArray[np.int64]


FIRST_ROWS, MAX_NUMBERS = 8, 2**20
"""Samples of the first read, and numbers of the largest one."""


PROBE_ROWS = 64
"""Samples over the whole split whose targets are compared first."""


def check_finite(split: Dataset, name: str, rows: Indices, deadline: float) -> None:
    """Refuse inputs or targets of these rows that are NaN or infinite.

    Parameters
    ----------
    name : str
        Name of the split, for the message: "test".
    rows : array of int
        The samples to read, in ascending order.
    deadline : float
        The time of `time.monotonic` after which nothing more is read.

    Raises
    ------
    DataError
        It names split, sample and channel.
    """
    stored = unstandardised(split)
    axis = split.channel_axis if isinstance(split, Standardised) else 0
    if stored.input_dtype.is_floating_point or stored.input_dtype.is_complex:
        for part in _parts(rows, stored.shape, deadline):
            _refuse(stored, stored.inputs(part), part, name, axis)
    _check_other_inputs(stored, name, rows, deadline)
    if stored.target_dtype.is_floating_point:
        for part in _parts(rows, stored.target_shape, deadline):
            _refuse(stored, stored.targets(part), part, name, 0, "number of the target")


def _check_other_inputs(stored: Dataset, name: str, rows: Indices, deadline: float) -> None:
    for number, spec in enumerate(stored.other_inputs):
        if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            continue
        for part in _parts(rows, spec.shape, deadline):
            values = stored.read_other_inputs(part)[number]
            _refuse(stored, values, part, name, 0, f"number of input {number + 1}")


def all_targets_alike(split: Dataset, deadline: float) -> float | None:
    """Return the value that all numbers of all targets have; None where they differ, or where the
    deadline came first."""
    if split.size < 2:
        return None
    probes = np.unique(np.linspace(0, split.size - 1, PROBE_ROWS).astype(np.int64))
    first = split.targets(probes[:1]).flatten()[0]
    if bool((split.targets(probes) != first).any()):
        return None
    read = 0
    for part in _parts(np.arange(split.size), split.target_shape, deadline):
        read += len(part)
        if bool((split.targets(part) != first).any()):
            return None
    return float(first) if read == split.size else None


def has_finite_statistics(split: Dataset) -> bool:
    """Return whether mean and deviation are finite, by which a split is standardised."""
    statistics = getattr(split, "statistics", None)
    return statistics is None or all(bool(t.isfinite().all()) for t in statistics().values())


def _parts(rows: Indices, shape: tuple[int, ...], deadline: float) -> Iterator[Indices]:
    """Yield the rows in parts that double, until the deadline."""
    largest = max(1, MAX_NUMBERS // max(1, int(np.prod(shape))))
    start, size = 0, min(FIRST_ROWS, largest)
    while start < len(rows) and time.monotonic() < deadline:
        yield rows[start : start + size]
        start, size = start + size, min(2 * size, largest)


def _refuse(
    split: Dataset,
    values: torch.Tensor,
    rows: Indices,
    name: str,
    axis: int,
    part: str = "channel",
) -> None:
    """Refuse values of some rows that are not finite."""
    is_bad = ~values.isfinite()
    if not bool(is_bad.any()):
        return
    place = tuple(is_bad.nonzero()[0].tolist())
    channel = place[1 + axis] if len(place) > 1 else 0
    number = values[place].item()
    raise not_finite_error(
        split, name, NotFinite(1, int(rows[place[0]]), channel, str(number)), part
    )


def not_finite_error(
    split: Dataset,
    name: str,
    place: NotFinite,
    part: str = "channel",
    on_all_ranks: bool = False,
) -> DataError:
    """Return the error of a number that is NaN or infinite.

    Parameters
    ----------
    split : Dataset
        It holds the number.
    name : str
        Name of the split: "train".
    place : NotFinite
        Its count is of this number and of others that are known to be NaN or infinite.
    part : str
        The noun of its channel.
    on_all_ranks : bool
        Whether every rank raises the error.
    """
    source = others = ""
    if isinstance(split, Subset):
        source = f" (sample {split.source_index(place.sample)} of the data that it is a part of)"
    if place.count > 1:
        others = f", the first of {place.count:,} numbers"
    return DataError(
        "data.not-finite",
        f"sample {place.sample} of the {name} split{source} is not finite: {part} {place.channel} "
        f"is {place.value}{others}; correct it, or remove the sample",
        on_all_ranks=on_all_ranks,
    )
