"""One HDF5 dataset as an array source. Files are opened read-only and without locks, which
parallel file systems often lack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
from numpy.typing import ArrayLike

from dtrain.data.array_source import ArraySource
from dtrain.data.conversion import Array
from dtrain.errors import DataError, DtrainError


@final
class Hdf5Source(ArraySource):
    """The rows of one HDF5 dataset, read from the file; the file stays open after the first read.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        Name of the dataset: "x", "train/images".

    Raises
    ------
    DataError
        The file is missing or damaged, or lacks the dataset.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.location = path, name, str(path)
        with open_hdf5(path) as file:
            dataset = file.get(name)
            if not isinstance(dataset, h5py.Dataset):
                raise DataError(
                    "data.hdf5-dataset-missing",
                    f"{path} has no HDF5 dataset '{name}', only {list(file)}: write x and y",
                )
            _check_virtual_parts(dataset, path)
            self.shape, self.dtype = tuple(dataset.shape), dataset.dtype
            self.chunk_rows = dataset.chunks[0] if dataset.chunks else None
            self.compressed = dataset.compression is not None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_dataset"}

    @cached_property
    def _dataset(self) -> h5py.Dataset:
        return _open_unlocked(self.path)[self.name]

    def close(self) -> None:
        dataset = self.__dict__.pop("_dataset", None)
        if dataset is not None:
            dataset.file.close()

    def read(self, indices: ArrayLike) -> Array:
        try:
            return _gather(self._dataset, np.asarray(indices))
        except (OSError, RuntimeError) as error:
            raise read_error(self.path, error) from error

    def read_range(self, start: int, stop: int) -> Array:
        try:
            rows: Array = self._dataset[start:stop]
        except (OSError, RuntimeError) as error:
            raise read_error(self.path, error) from error
        return rows


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading.

    Raises
    ------
    DataError
        The file is missing or damaged.
    """
    try:
        with _open_unlocked(path) as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise read_error(path, error) from error


def _check_virtual_parts(rows: h5py.Dataset, path: Path) -> None:
    """Refuse a virtual data set whose parts are not all there: HDF5 reads fill values for them.

    Raises
    ------
    DataError
        It names the first file that is missing.
    """
    if not rows.is_virtual:
        return
    prefix = os.environ.get("HDF5_VDS_PREFIX", "").replace("${ORIGIN}", str(path.parent))
    names = dict.fromkeys(source.file_name for source in rows.virtual_sources())
    missing = [
        name
        for name in names
        if name != "." and "%" not in name  # this file; a pattern of many files
        if not any((folder / name).is_file() for folder in (Path(prefix), path.parent, Path()))
    ]
    if missing:
        raise DataError(
            "data.hdf5-part-missing",
            f"{path}: the virtual data set '{rows.name.lstrip('/')}' lacks {len(missing)} of "
            f"{len(names)} files, first {missing[0]}, and HDF5 would read zeros for them: restore "
            "the files, or make the virtual data set without them",
        )


def _gather(rows: h5py.Dataset, indices: Array) -> Array:
    """Read samples in the order of `indices`, those of one chunk as one slice.

    Reading 128 single rows takes a hundred times as long as one slice of 128.
    """
    result = np.empty((len(indices), *rows.shape[1:]), rows.dtype)
    order = np.argsort(indices, kind="stable")
    step = rows.chunks[0] if rows.chunks else 64
    breaks = np.flatnonzero(np.diff(indices[order] // step)) + 1
    for part in np.split(order, breaks) if len(order) else []:
        in_chunk = indices[part]
        low, high = int(in_chunk[0]), int(in_chunk[-1]) + 1
        result[part] = rows[low:high][in_chunk - low]
    return result


def _open_unlocked(path: Path) -> h5py.File:
    return h5py.File(path, "r", locking=False)


def read_error(path: Path, error: Exception) -> DtrainError:
    if not path.is_file():
        return DataError(
            "data.file-missing",
            f"{path} does not exist: correct the path, or make the file with 'dtrain data import'",
        )
    text = str(error).strip().splitlines()[0]
    return DataError(
        "data.file-damaged",
        f"{path} cannot be read as HDF5 ({path.stat().st_size} bytes): {text}; copy or "
        "import it again",
    )
