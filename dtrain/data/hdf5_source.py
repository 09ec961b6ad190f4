"""One HDF5 dataset as an array source. Files are opened read-only and without locks, which
parallel file systems often lack."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
from numpy.typing import ArrayLike

from dtrain.data.array_names import list_arrays
from dtrain.data.array_source import ArraySource
from dtrain.data.conversion import Array
from dtrain.data.hdf5_rows import PlainRows, plain_rows
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
        self.path, self.name, self.location = path, name, f"{path} '{name}'"
        with open_hdf5(path) as file:
            dataset = find_dataset(file, name, path)
            if dataset is None:
                raise missing_datasets(file, [name], path)
            _check_virtual_parts(dataset)
            self.shape, self.dtype = tuple(dataset.shape or ()), dataset.dtype
            self.chunk_rows = dataset.chunks[0] if dataset.chunks else None
            self.compressed = dataset.id.get_create_plist().get_nfilters() > 0

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_rows"}

    @cached_property
    def _rows(self) -> PlainRows | h5py.Dataset:
        """The rows where they lie in the file, or the dataset."""
        file = _open_unlocked(self.path)
        dataset = file[self.name]
        rows = plain_rows(dataset)
        if rows is None:
            return dataset
        file.close()
        return rows

    def close(self) -> None:
        rows = self.__dict__.pop("_rows", None)
        if isinstance(rows, PlainRows):
            rows.close()
        elif rows is not None:
            rows.file.close()

    def read(self, indices: ArrayLike) -> Array:
        order = np.asarray(indices, np.int64)
        try:
            rows = self._rows
            return rows.read(order) if isinstance(rows, PlainRows) else _gather(rows, order)
        except (OSError, RuntimeError) as error:
            raise read_error(self.path, error) from error

    def read_range(self, start: int, stop: int) -> Array:
        try:
            rows = self._rows
            if isinstance(rows, PlainRows):
                return rows.read(np.arange(start, stop))
            part: Array = rows[start:stop]
        except (OSError, RuntimeError) as error:
            raise read_error(self.path, error) from error
        return part

    def read_into(self, rows: Array, start: int) -> None:
        stop = start + len(rows)
        try:
            stored = self._rows
            if isinstance(stored, PlainRows):
                rows[...] = stored.read(np.arange(start, stop))
            else:
                stored.read_direct(rows, np.s_[start:stop])
        except (OSError, RuntimeError) as error:
            raise read_error(self.path, error) from error


def find_dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset | None:
    """Return the dataset of a name, None where there is none.

    Raises
    ------
    DataError
        The name leads to another file, which is missing.
    """
    for end in [i for i, letter in enumerate(name) if i and letter == "/"] + [len(name)]:
        part = name[:end].encode()
        if file.get(name[:end]) is not None:
            continue
        links = file.id.links
        if links.exists(part) and links.get_info(part).type == h5py.h5l.TYPE_EXTERNAL:
            other, target = (os.fsdecode(text) for text in links.get_val(part))
            raise DataError(
                "data.hdf5-part-missing",
                f"{path}: '{name[:end]}' is a link to '{target}' in the file {other}, which is "
                "missing or has no such name: restore the file",
            )
        return None
    dataset = file.get(name)
    return dataset if isinstance(dataset, h5py.Dataset) else None


def missing_datasets(file: h5py.File, names: Sequence[str], path: Path) -> DataError:
    """Return the error for names that a file does not have."""
    text = " and ".join(f"'{name}'" for name in names)
    return DataError(
        "data.hdf5-dataset-missing",
        f"{path} has no HDF5 dataset {text}, only "
        f"{list_arrays(dataset_shapes(file), names)}: set x and y to the names of samples and "
        "targets",
    )


def dataset_shapes(file: h5py.File) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all datasets of a file by name, those of groups included."""
    shapes = {}

    def add(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            shapes[name] = tuple(item.shape or ())

    file.visititems(add)
    return shapes


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


def _check_virtual_parts(rows: h5py.Dataset) -> None:
    """Refuse a virtual data set whose parts are not all there: HDF5 reads fill values for them.

    Raises
    ------
    DataError
        It names the first file that is missing.
    """
    if not rows.is_virtual:
        return
    path = Path(os.fsdecode(rows.file.filename))  # another one behind a link
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
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")  # this process has it open with locks


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
