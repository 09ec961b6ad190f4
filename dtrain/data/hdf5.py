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

from dtrain.data.memory import fits
from dtrain.data.source import (
    Array,
    Data,
    Moments,
    Source,
    alike,
    below,
    check,
    floats,
    integers,
    span,
)
from dtrain.errors import DATA, Refusal


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
                raise Refusal(f"[data] {key} = {value!r}: give the path of an HDF5 file")

    def open(self, folder: Path) -> Data:
        """Return both splits; no image is read.

        Raises
        ------
        Refusal
            With code 3, for whatever is wrong with the files.
        """
        train = File(folder / self.train)
        test = File(folder / self.test, train)
        return alike(Data(train, test), f"{train.path} and {test.path}")


@final
class File(Source):
    """One split in one file: in memory where it fits (see `memory`), else read piece by piece.

    Parameters
    ----------
    path : Path
        The file.
    train : File, optional
        The training split, whose classes count for this one too.
    """

    def __init__(self, path: Path, train: File | None = None) -> None:
        self.path = path
        with opened(path) as file:
            for key in ("x", "y"):
                if not isinstance(file.get(key), h5py.Dataset):
                    raise Refusal(f"{path}: no data set '{key}': found {list(file)}", DATA)
            x, self._y = file["x"], np.asarray(file["y"][()])
            check(x, self._y, str(path))
            self.size, self.shape, self._kind = len(x), tuple(x.shape[1:]), x.dtype
            self.names = _names(file)
            self.span = span(x.dtype)
            self._known = _known(file, self.shape[0], path)
        self.classes = self._classes(train)
        below(self._y, self.classes, str(path))

    def _classes(self, train: File | None) -> int:
        if train is None:
            return len(self.names) or int(self._y.max()) + 1
        if train.names and self.names and self.names != train.names:
            raise Refusal(
                f"{self.path} has the {len(self.names)} classes {_some(self.names)} and "
                f"{train.path} the {len(train.names)} classes {_some(train.names)}: import both "
                f"from the same classes",
                DATA,
            )
        return train.classes

    @cached_property
    def slow(self) -> bool:
        """Whether the samples do not fit into memory; found out on first need."""
        return not fits(self.size * int(np.prod(self.shape)) * self._kind.itemsize)

    @cached_property
    def _rows(self) -> Any:
        """The samples: an array, or the data set of a file that stays open."""
        if not self.slow:
            with opened(self.path) as file:
                return file["x"][()]
        return _file(self.path)["x"]

    def inputs(self, indices: ArrayLike) -> Tensor:
        wanted = np.asarray(indices)
        try:
            rows = self._rows
            return floats(rows[wanted] if isinstance(rows, np.ndarray) else gather(rows, wanted))
        except (OSError, RuntimeError) as error:
            raise _damaged(self.path, error) from error

    def targets(self, indices: ArrayLike) -> Tensor:
        return integers(self._y[np.asarray(indices)])

    def moments(self) -> Moments:
        if self._known is None:
            return super().moments()
        scale = 255.0 if self._kind == np.uint8 else 1.0
        return self._known[0] / scale, self._known[1] / scale


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file to read; a missing or damaged one is a refusal."""
    try:
        with _file(path) as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise _damaged(path, error) from error


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


def _file(path: Path) -> h5py.File:
    return h5py.File(path, "r", locking=False)


def _names(file: h5py.File) -> tuple[str, ...]:
    """Return the names of the classes; numbers where only their count is known, () if not even."""
    found = np.asarray(file.attrs.get("classes", ()))
    if found.ndim == 0 and found.dtype.kind in "iu":
        return tuple(str(number) for number in range(int(found)))
    return tuple(each.decode() if isinstance(each, bytes) else str(each) for each in found.flat)


def _known(file: h5py.File, channels: int, path: Path) -> Moments | None:
    """Return the moments that the file states, or None."""
    if "mean" not in file.attrs or "std" not in file.attrs:
        return None
    mean, deviation = (np.asarray(file.attrs[key]) for key in ("mean", "std"))
    if any(each.shape != (channels,) or each.dtype.kind not in "iuf" for each in (mean, deviation)):
        raise Refusal(
            f"{path}: attributes mean and std have shapes {mean.shape} and "
            f"{deviation.shape}: give {channels} numbers each, one per channel",
            DATA,
        )
    mean, deviation = mean.astype(np.float64), deviation.astype(np.float64)
    if not np.isfinite([mean, deviation]).all() or (deviation < 0).any():
        raise Refusal(
            f"{path}: attributes mean = {mean} and std = {deviation} are no statistics: "
            f"delete them, and they will be computed",
            DATA,
        )
    return mean, deviation


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _damaged(path: Path, error: Exception) -> Refusal:
    if not path.is_file():
        return Refusal(
            f"{path}: no such file (looked for HDF5 with x and y): make it with "
            f"'dtrain data import'",
            DATA,
        )
    text = str(error).strip().splitlines()[0]
    return Refusal(f"{path}: cannot be read as HDF5, {path.stat().st_size} bytes: {text}", DATA)
