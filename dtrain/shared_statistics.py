"""The statistics of the training split at the start of a run: kept ones, or one pass of all ranks.

Invariant: all ranks have the same bits afterwards, on any number of ranks, or all raise an error.
"""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from dtrain.comm.agree import all_or_none, broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.data.dataset import DatasetSplits
from dtrain.data.kept_statistics import from_lists, read_kept
from dtrain.data.sampler import even_ranges
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.statistics import (
    NotFinite,
    PieceSums,
    Statistics,
    StatisticsPass,
    TrainingStatistics,
    find_standardised,
)
from dtrain.data.value_check import not_finite_error

ANNOUNCED_S = 4.0
"""Seconds that a pass takes, or will take as far as known, before it is announced."""


FIRST_ESTIMATE_S = 1.0
"""Seconds after which the time of a pass is estimated."""


INTERVAL_S = 20.0
"""Seconds between two announcements."""


def use_kept_statistics(data: DatasetSplits, comm: Comm, folders: Sequence[Path]) -> None:
    """Take the statistics that the first of some run folders keeps for these data.

    Collective over all ranks. Nothing is done where inputs are not standardised, where the data
    come with statistics, or where no folder has those of these data.
    """
    standardised = find_standardised(data.train)
    if standardised is None or standardised.training.is_known:
        return
    training = standardised.training

    def read_first() -> list[Any] | None:
        kept = (read_kept(folder, training) for folder in folders)
        return next((lists for lists in kept if lists is not None), None)

    lists = broadcast_object(comm, read_first)
    if lists is not None:
        training.use(from_lists(lists))


def share_statistics(data: DatasetSplits, comm: Comm, note: Callable[[str], None]) -> bool:
    """Compute the statistics of the training split, each rank a share. Collective over all ranks.

    Nothing is done where inputs are not standardised, or the statistics are known.

    Parameters
    ----------
    note : callable
        Prints a line; called on rank 0 while a pass takes long.

    Returns
    -------
    bool
        Whether the statistics were computed.

    Raises
    ------
    DataError
        On all ranks, if a sample cannot be read, or a number is NaN or infinite.
    """
    standardised = find_standardised(data.train)
    if standardised is None or standardised.training.is_known:
        return False
    training = standardised.training
    progress = PassProgress(training, note) if comm.rank == 0 else None
    statistics = _compute(training, comm, progress)
    if statistics.not_finite is not None:
        raise not_finite_error(training.dataset, "train", statistics.not_finite, on_all_ranks=True)
    training.use(statistics.moments)
    return True


def _compute(
    training: TrainingStatistics, comm: Comm, report: Callable[[int, int], None] | None
) -> Statistics:
    """Return the statistics of a pass of all ranks. Collective over all ranks."""

    def sum_share() -> tuple[StatisticsPass, list[PieceSums]]:
        reading = StatisticsPass(training.dataset, training.axis)
        share = even_ranges(len(reading.pieces), comm.size)[comm.rank]
        pieces = reading.pieces[share.start : share.stop]
        return reading, reading.sum_pieces(pieces, report)

    reading, sums = all_or_none(comm, sum_share)
    records = comm.allgather_object([_to_record(each) for each in sums])
    return reading.combine([_from_record(record) for rank in records for record in rank])


def _to_record(sums: PieceSums) -> list[Any]:
    """Return sums as plain values: integers as such, floats as the text of their bytes."""
    place = None if sums.not_finite is None else list(dataclasses.astuple(sums.not_finite))
    if sums.sums.dtype.kind == "f":
        text = base64.b64encode(sums.sums.tobytes()).decode()
        return [text, list(sums.sums.shape), place]
    return [sums.sums.tolist(), None, place]


def _from_record(record: list[Any]) -> PieceSums:
    """Return the sums of `_to_record`."""
    numbers, shape, place = record
    if shape is None:
        sums = np.array(numbers, dtype=object)
    else:
        sums = np.frombuffer(base64.b64decode(numbers), np.float64).reshape(shape)
    return PieceSums(sums, None if place is None else NotFinite(*place))


@final
class PassProgress:
    """Announces a pass that takes long, and how long it still takes.

    Parameters
    ----------
    training : TrainingStatistics
        The statistics that are computed.
    note : callable
        Prints a line.
    """

    def __init__(self, training: TrainingStatistics, note: Callable[[str], None]) -> None:
        self._training, self._note = training, note
        self._start = time.monotonic()
        self._next_s = FIRST_ESTIMATE_S
        self._is_announced = False

    def __call__(self, done: int, pieces: int) -> None:
        """Print a line if one is due; `done` of the `pieces` of this rank are summed."""
        elapsed_s = time.monotonic() - self._start
        left_s = elapsed_s / done * (pieces - done)
        is_long = elapsed_s + left_s >= ANNOUNCED_S
        if done == pieces or elapsed_s < self._next_s or not (is_long or self._is_announced):
            return
        self._next_s = elapsed_s + INTERVAL_S
        text = f"statistics of the training split: {done / pieces:.0%}, about {left_s:.0f} s left"
        self._note(text if self._is_announced else text + self._hint())
        self._is_announced = True

    def _hint(self) -> str:
        """Return how the next run can do without, where the data are an HDF5 file."""
        dataset = self._training.dataset
        location = dataset.sources[0].location if isinstance(dataset, SourceDataset) else ""
        if not location.endswith((".h5", ".hdf5")):
            return ""
        return f"; 'dtrain data stats {location}' writes them into the set once"
