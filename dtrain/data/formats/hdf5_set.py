"""HDF5 files with samples (N, C, H, W or N, ...), targets (N, ...) and attributes of the file.

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

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import h5py
import numpy as np

from dtrain.data.array_source import ArraySource
from dtrain.data.dataset import Moments
from dtrain.data.formats.array_names import SplitNames
from dtrain.data.formats.hdf5_source import (
    Hdf5Source,
    dataset_shapes,
    find_dataset,
    missing_datasets,
    open_hdf5,
)
from dtrain.data.formats.named_array_set import NamedArraySet
from dtrain.data.source_dataset import SplitSources
from dtrain.errors import DataError
from dtrain.tasks.task import DEFAULT_TASK, Task


@final
@dataclass(frozen=True)
class Hdf5(NamedArraySet):
    """Samples and targets in HDF5 files, under names that may lie in groups."""

    def list_names(self, path: Path) -> Mapping[str, tuple[int, ...]]:
        with open_hdf5(path) as file:
            return dataset_shapes(file)

    def has_name(self, path: Path, name: str) -> bool:
        with open_hdf5(path) as file:
            return find_dataset(file, name, path) is not None

    def missing_array(self, path: Path, names: Sequence[str]) -> DataError:
        with open_hdf5(path) as file:
            return missing_datasets(file, names, path)

    def open_array(self, path: Path, name: str) -> ArraySource:
        return Hdf5Source(path, name)

    def open_split(self, path: Path, names: SplitNames, needs_targets: bool) -> SplitSources:
        part = super().open_split(path, names, needs_targets)
        with open_hdf5(path) as file:
            moments = _read_moments(file, part.inputs[0].shape[1:], path)
            return dataclasses.replace(part, class_names=read_class_names(file), moments=moments)


def open_split(path: Path, task: Task = DEFAULT_TASK) -> SplitSources:
    """Open the file of one split, with the names `x` and `y`.

    Raises
    ------
    DataError
        The file is missing or damaged, or its statistics are not legal.
    """
    names = SplitNames(("x",), "y")
    return Hdf5(str(path)).open_split(path, names, needs_targets=task.target == "data")


def read_class_names(file: h5py.File) -> tuple[str, ...]:
    """Return the classes' names; numbers where the file has only their count, () without it."""
    names = np.asarray(file.attrs.get("classes", ()))
    if names.ndim == 0 and names.dtype.kind in "iu":
        return tuple(str(number) for number in range(int(names)))
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.flat)


def _read_moments(file: h5py.File, shape: tuple[int, ...], path: Path) -> Moments | None:
    """Return the file's attributes `mean` and `std`, or None where one is absent."""
    if "mean" not in file.attrs or "std" not in file.attrs:
        return None
    mean, deviation = (np.asarray(file.attrs[key]) for key in ("mean", "std"))
    if (
        mean.shape != deviation.shape
        or mean.shape not in [(channels,) for channels in shape]
        or not {mean.dtype.kind, deviation.dtype.kind} <= set("iuf")
    ):
        raise DataError(
            "data.statistics-shape",
            f"{path}: attributes mean and std have shapes {mean.shape} and {deviation.shape}, but "
            f"samples {shape}: give one number each per channel",
        )
    mean, deviation = mean.astype(np.float64), deviation.astype(np.float64)
    if not np.isfinite([mean, deviation]).all() or (deviation < 0).any():
        raise DataError(
            "data.statistics-invalid",
            f"{path}: attributes mean = {mean} and std = {deviation} must be finite, and std not "
            "negative: delete both, and dtrain computes them",
        )
    return mean, deviation
