"""One array of an HDF5 file whose rows are steps: mapped where it lies in one piece."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import h5py
import numpy as np

from dtrain.data.array_source import ArraySource, LazySource
from dtrain.data.conversion import Array
from dtrain.data.formats.hdf5_source import find_dataset, missing_datasets, open_hdf5
from dtrain.data.formats.mapped_source import MappedSource


def is_hdf5(path: Path) -> bool:
    """Return whether a file is an HDF5 file."""
    return path.is_file() and bool(h5py.is_hdf5(path))


def open_steps(path: Path, name: str) -> ArraySource:
    """Return an array of a file, read through a memory map, or as a whole where it is stored in
    chunks.

    Raises
    ------
    DataError
        The file is missing or damaged, or lacks the array.
    """
    with open_hdf5(path) as file:
        rows = find_dataset(file, name, path)
        if rows is None:
            raise missing_datasets(file, [name], path)
        shape, dtype, location = tuple(rows.shape), rows.dtype, f"{path} '{name}'"
        offset = None if rows.is_virtual or rows.external else rows.id.get_offset()
        is_same_file = rows.file.filename == file.filename
    if offset is not None and is_same_file and dtype.kind in "iuf":
        return MappedSource(path, offset, shape, dtype, location)
    return LazySource(shape, dtype, partial(_load, path, name), location)


def _load(path: Path, name: str) -> Array:
    with open_hdf5(path) as file:
        return np.asarray(file[name][()])
