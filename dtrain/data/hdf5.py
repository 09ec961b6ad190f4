"""HDF5 files: `x` (N, C, H, W or N, ...), `y` (N,), and attributes of the file.

===========  ==========================================================================
attribute    meaning; each may be left out
===========  ==========================================================================
`classes`    the names of the classes, or their number; else the largest label says it
`mean`       per channel, over the training split, in the units of `x` as stored
`std`        likewise; both are computed from the training file where one is absent
===========  ==========================================================================

Invariant: header and labels are read and checked at once, images on first need; files are opened
read-only and without locks, which parallel file systems often lack.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from dtrain.data.dataset import (
    Array,
    Dataset,
    DatasetSplits,
    Moments,
    check_arrays,
    check_labels,
    check_splits,
    to_float_tensor,
    to_int_tensor,
    value_range,
)
from dtrain.errors import ConfigError, DataError, DtrainError


@final
@dataclass(frozen=True)
class Hdf5:
    """Two files, one per split.

    Parameters
    ----------
    train, test : str
        Paths, relative to the run file's folder.
    """

    train: str
    test: str

    def __post_init__(self) -> None:
        for key, value in (("train", self.train), ("test", self.test)):
            if not isinstance(value, str) or not value:
                raise ConfigError(
                    "todo.key", f"[data] {key} = {value!r}: give the path of an HDF5 file"
                )

    def open(self, folder: Path) -> DatasetSplits:
        """Return both splits; no image is read.

        Raises
        ------
        DtrainError
            With code 3, for whatever is wrong with the files.
        """
        train = Hdf5Dataset(folder / self.train)
        test = Hdf5Dataset(folder / self.test, train)
        return check_splits(DatasetSplits(train, test), f"{train.path} and {test.path}")


@final
class Hdf5Dataset(Dataset):
    """One split in one file: in memory where it fits (see `memory`), else read piece by piece.

    Parameters
    ----------
    path : Path
        The file.
    train : File, optional
        The training split, whose classes count for this one too.
    """

    def __init__(self, path: Path, train: Hdf5Dataset | None = None) -> None:
        self.path = path
        with open_file(path) as file:
            for key in ("x", "y"):
                if not isinstance(file.get(key), h5py.Dataset):
                    raise DataError("todo.key", f"{path}: no data set '{key}': found {list(file)}")
            x, self._y = file["x"], np.asarray(file["y"][()])
            check_arrays(x, self._y, str(path))
            self.size, self.shape, self._dtype = len(x), tuple(x.shape[1:]), x.dtype
            self.class_names = _class_names(file)
            self.value_range = value_range(x.dtype)
            self._file_moments = _read_moments(file, self.shape[0], path)
        self.classes = self._count_classes(train)
        check_labels(self._y, self.classes, str(path))

    def _count_classes(self, train: Hdf5Dataset | None) -> int:
        if train is None:
            return len(self.class_names) or int(self._y.max()) + 1
        if train.class_names and self.class_names and self.class_names != train.class_names:
            raise DataError(
                "todo.key",
                f"{self.path} has the {len(self.class_names)} classes {_shorten(self.class_names)} and "
                f"{train.path} the {len(train.class_names)} classes {_shorten(train.class_names)}: import both "
                f"from the same classes",
            )
        return train.classes

    @cached_property
    def slow(self) -> bool:
        """Whether the samples do not fit into memory; found out on first need."""
        return not fits_in_memory(self.size * int(np.prod(self.shape)) * self._dtype.itemsize)

    @cached_property
    def _rows(self) -> Any:
        """The samples: an array, or the data set of a file that stays open."""
        if not self.slow:
            with open_file(self.path) as file:
                return file["x"][()]
        return _open_unlocked(self.path)["x"]

    def inputs(self, indices: ArrayLike) -> Tensor:
        wanted = np.asarray(indices)
        try:
            rows = self._rows
            return to_float_tensor(
                rows[wanted] if isinstance(rows, np.ndarray) else gather(rows, wanted)
            )
        except (OSError, RuntimeError) as error:
            raise _read_error(self.path, error) from error

    def targets(self, indices: ArrayLike) -> Tensor:
        return to_int_tensor(self._y[np.asarray(indices)])

    def moments(self) -> Moments:
        if self._file_moments is None:
            return super().moments()
        scale = 255.0 if self._dtype == np.uint8 else 1.0
        return self._file_moments[0] / scale, self._file_moments[1] / scale


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """Open a file to read; a missing or damaged one is a refusal."""
    try:
        with _open_unlocked(path) as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise _read_error(path, error) from error


def gather(rows: h5py.Dataset, indices: Array) -> Array:
    """Return samples in the order of `indices`, reading each stretch of a file once.

    128 single rows cost a hundred times a slice: rows in the same chunk are read as one slice.
    """
    result = np.empty((len(indices), *rows.shape[1:]), rows.dtype)
    order = np.argsort(indices, kind="stable")
    step = rows.chunks[0] if rows.chunks else 64
    breaks = np.flatnonzero(np.diff(indices[order] // step)) + 1
    for part in np.split(order, breaks) if len(order) else []:
        wanted = indices[part]
        low, high = int(wanted[0]), int(wanted[-1]) + 1
        result[part] = rows[low:high][wanted - low]
    return result


def _open_unlocked(path: Path) -> h5py.File:
    return h5py.File(path, "r", locking=False)


def _class_names(file: h5py.File) -> tuple[str, ...]:
    """Return the names of the classes; numbers where only their count is known, () if not even."""
    found = np.asarray(file.attrs.get("classes", ()))
    if found.ndim == 0 and found.dtype.kind in "iu":
        return tuple(str(number) for number in range(int(found)))
    return tuple(each.decode() if isinstance(each, bytes) else str(each) for each in found.flat)


def _read_moments(file: h5py.File, channels: int, path: Path) -> Moments | None:
    """Return the moments that the file states, or None."""
    if "mean" not in file.attrs or "std" not in file.attrs:
        return None
    mean, deviation = (np.asarray(file.attrs[key]) for key in ("mean", "std"))
    if any(each.shape != (channels,) or each.dtype.kind not in "iuf" for each in (mean, deviation)):
        raise DataError(
            "todo.key",
            f"{path}: attributes mean and std have shapes {mean.shape} and "
            f"{deviation.shape}: give {channels} numbers each, one per channel",
        )
    mean, deviation = mean.astype(np.float64), deviation.astype(np.float64)
    if not np.isfinite([mean, deviation]).all() or (deviation < 0).any():
        raise DataError(
            "todo.key",
            f"{path}: attributes mean = {mean} and std = {deviation} are no statistics: "
            f"delete them, and they will be computed",
        )
    return mean, deviation


def _shorten(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_error(path: Path, error: Exception) -> DtrainError:
    if not path.is_file():
        return DataError(
            "todo.key",
            f"{path}: no such file (looked for HDF5 with x and y): make it with "
            f"'dtrain data import'",
        )
    text = str(error).strip().splitlines()[0]
    return DataError(
        "todo.key", f"{path}: cannot be read as HDF5, {path.stat().st_size} bytes: {text}"
    )


MEMORY_FRACTION = 1 / 8


MAX_BYTES = 4 * 2**30


def fits_in_memory(size_bytes: int) -> bool:
    """Say whether `size_bytes` are at most an eighth of the available memory, and at most 4 GiB.

    An eighth, since several ranks on a host each hold their own copy; 4 GiB, since batch systems
    grant a job less than the host shows.
    """
    return size_bytes <= min(MEMORY_FRACTION * available_bytes(), MAX_BYTES)


def available_bytes() -> int:
    """Return the memory that new data can have, by the kernel's estimate; else all there is."""
    table = Path("/proc/meminfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
