"""Mean and standard deviation of the samples of a file, written into it as attributes.

Invariant: at any moment the file has the whole old pair, the whole new pair, or no pair: `std` is
removed first and written last, and readers ignore a `mean` without it.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from dtrain.data.dataset import Moments, moments
from dtrain.data.hdf5_pieces import open_for_pieces, read_pieces
from dtrain.data.hdf5_source import Hdf5Source
from dtrain.errors import ConfigError, DataError


def store_statistics(path: Path, channels: str | int = "first", name: str = "x") -> Moments:
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


def channel_axis(channels: str | int, shape: tuple[int, ...]) -> int:
    """Return the axis of the channels in an array (n, ...).

    Raises
    ------
    ConfigError
        There is no such axis.
    """
    axes = len(shape) - 1
    number = {"first": 0, "last": axes - 1}.get(str(channels), channels)
    if not isinstance(number, int) or not 0 <= number < axes:
        raise ConfigError(
            "data.channels-axis",
            f"channels = {channels}: samples have shape {shape[1:]}: choose first, last or an axis "
            f"from 0 to {axes - 1}",
        )
    return number + 1


def _read_statistics(path: Path, channels: str | int, name: str) -> Moments:
    source = Hdf5Source(path, name)
    axis = channel_axis(channels, source.shape)
    if source.dtype.kind not in "biuf" or 0 in source.shape:
        raise DataError(
            "data.statistics-dtype",
            f"{path}: '{name}' has dtype {source.dtype} and shape {source.shape}: statistics need "
            "at least one integer or real number",
        )
    with open_for_pieces(path) as file:
        pieces = read_pieces(file[name], "statistics")
        statistics = moments(np.moveaxis(piece, axis, 1) for piece in pieces)
    if not np.isfinite(statistics).all():
        channel = int(np.flatnonzero(~np.isfinite(statistics).all(axis=0))[0])
        raise DataError(
            "data.statistics-not-finite",
            f"{path}: '{name}' has values in channel {channel} that are NaN or infinite; 'dtrain "
            f"data describe --values {path}' finds them",
        )
    return statistics
