"""HDF5 files with `x` (N, C, H, W or N, ...), `y` (N,) and optional attributes of the file.

===========  ==========================================================================
attribute    meaning
===========  ==========================================================================
`classes`    the classes' names or their number; without it, the largest label plus one
`mean`       per channel, over the training split, in the units of `x` as stored
`std`        likewise; both are computed from the training file where one is absent
===========  ==========================================================================

Invariant: shape and targets are checked when a file is opened; images are read on first need.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import h5py
import numpy as np

from dtrain.data.dataset import DatasetSplits, Moments
from dtrain.data.hdf5_source import Hdf5Source, open_hdf5
from dtrain.data.source_dataset import SplitSources, make_splits
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import DEFAULT_TASK, Task


@final
@dataclass(frozen=True)
class Hdf5:
    """Two HDF5 files, one per split.

    Parameters
    ----------
    train, test : str
        Paths, relative to the run file's folder.

    Raises
    ------
    ConfigError
        A path is empty or no string.
    """

    train: str
    test: str

    def __post_init__(self) -> None:
        for key, value in (("train", self.train), ("test", self.test)):
            if not isinstance(value, str) or not value:
                raise ConfigError(
                    "data.path-invalid", f"[data] {key} = {value!r}: give the path of an HDF5 file"
                )

    def open(self, folder: Path, task: Task = DEFAULT_TASK) -> DatasetSplits:
        """Open both files; no image is read.

        Raises
        ------
        DataError
            A file is missing or damaged, or the two do not fit each other.
        """
        paths = {"train": folder / self.train, "test": folder / self.test}
        return make_splits({name: open_split(path, task) for name, path in paths.items()}, task)


def open_split(path: Path, task: Task = DEFAULT_TASK) -> SplitSources:
    """Open the file of one split.

    Raises
    ------
    DataError
        The file is missing or damaged, or its statistics are not legal.
    """
    x = Hdf5Source(path, "x")
    y = Hdf5Source(path, "y") if task.target == "data" else None
    with open_hdf5(path) as file:
        channels = x.shape[1] if x.ndim > 1 else 0
        moments = _read_moments(file, channels, path)
        return SplitSources(str(path), (x,), y, _class_names(file), moments)


def _class_names(file: h5py.File) -> tuple[str, ...]:
    """Return the classes' names; numbers where the file has only their count, () without it."""
    names = np.asarray(file.attrs.get("classes", ()))
    if names.ndim == 0 and names.dtype.kind in "iu":
        return tuple(str(number) for number in range(int(names)))
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.flat)


def _read_moments(file: h5py.File, channels: int, path: Path) -> Moments | None:
    """Return the file's attributes `mean` and `std`, or None where one is absent."""
    if "mean" not in file.attrs or "std" not in file.attrs:
        return None
    mean, deviation = (np.asarray(file.attrs[key]) for key in ("mean", "std"))
    if any(
        statistic.shape != (channels,) or statistic.dtype.kind not in "iuf"
        for statistic in (mean, deviation)
    ):
        raise DataError(
            "data.statistics-shape",
            f"{path}: attributes mean and std have shapes {mean.shape} and "
            f"{deviation.shape}: give {channels} numbers each, one per channel",
        )
    mean, deviation = mean.astype(np.float64), deviation.astype(np.float64)
    if not np.isfinite([mean, deviation]).all() or (deviation < 0).any():
        raise DataError(
            "data.statistics-invalid",
            f"{path}: attributes mean = {mean} and std = {deviation} must be finite, and std not "
            "negative: delete both, and dtrain computes them",
        )
    return mean, deviation
