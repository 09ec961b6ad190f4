"""Mean and standard deviation of the samples of a file, written into it as attributes.

Invariant: at any moment the file has the whole old pair, the whole new pair, or no pair: `std` is
removed first and written last, and readers ignore a `mean` without it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import h5py

from dtrain.data.dataset import Moments
from dtrain.data.hdf5_pieces import open_for_pieces, show_progress
from dtrain.data.hdf5_source import Hdf5Source
from dtrain.data.statistics import Channels, StoredRows, channel_axis, compute_statistics
from dtrain.errors import ConfigError, DataError


def store_statistics(path: Path, channels: Channels = "first", name: str = "x") -> Moments:
    """Compute mean and deviation per channel of a dataset and write them into its file.

    Parameters
    ----------
    channels : "first", "last" or int
        The axis of the channels; a number counts the axes of a sample, from 0.
    name : str
        Name of the dataset.

    Returns
    -------
    tuple of array
        Mean and standard deviation, each (channels,), in the units of the stored samples.

    Raises
    ------
    ConfigError
        There is no such axis, or the file cannot be written.
    DataError
        The file is missing or damaged, or its samples are complex or not finite.
    """
    statistics = _read_statistics(path, channels, name)
    try:
        with h5py.File(path, "r+", locking=False) as file:
            file.attrs.pop("std", None)
            file.flush()
            for key, values in zip(("mean", "std"), statistics, strict=True):
                file.attrs[key] = values
                file.flush()
    except (OSError, RuntimeError) as error:
        text = str(error).strip().splitlines()[0]
        raise ConfigError(
            "data.statistics-unwritten",
            f"cannot write the statistics into {path}: {text}; make a copy by 'dtrain data "
            "rechunk' and write them there",
        ) from error
    return statistics


def _read_statistics(path: Path, channels: Channels, name: str) -> Moments:
    source = Hdf5Source(path, name)
    axis = channel_axis(channels, source.shape[1:])
    if source.dtype.kind not in "biuf" or 0 in source.shape:
        raise DataError(
            "data.statistics-dtype",
            f"{path}: '{name}' has dtype {source.dtype} and shape {source.shape}: statistics need "
            "at least one integer or real number",
        )
    report = partial(show_progress, "statistics")
    with open_for_pieces(path) as file:
        rows = StoredRows(file[name])
        statistics = compute_statistics(rows, axis, stored_units=True, report=report)
    place = statistics.not_finite
    if place is not None:
        raise DataError(
            "data.statistics-not-finite",
            f"{path}: '{name}' has {place.count} numbers that are not finite, first {place.value} "
            f"in sample {place.sample}, channel {place.channel}: correct or remove these samples",
        )
    return statistics.moments
