"""Data in files: every format gives the arrays that were written, and names what does not fit."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dtrain.data import load_data
from dtrain.data.array_source import ArraySource
from dtrain.data.hdf5_rows import plain_rows
from dtrain.data.hdf5_source import Hdf5Source
from dtrain.data.idx_set import open_idx
from dtrain.data.npy_source import open_npy, open_npz_array
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import Task
from tests.refusals import refuses

RNG = np.random.default_rng(0)
ROWS = 37
X = RNG.integers(0, 256, (ROWS, 3, 4), dtype=np.uint8)
Y = np.arange(ROWS) % 5


def load(name: str, folder: Path, *, task: Task | None = None, **keys: Any) -> Any:
    """Open a data set without standardisation."""
    options = {} if task is None else {"task": task}
    validation = keys.pop("validation", 0.0)
    return load_data(name, keys, folder, normalise=False, validation=validation, **options)


def write_hdf5(path: Path, attributes: dict[str, Any] | None = None, **arrays: Any) -> None:
    """Write an HDF5 file; `__` in a name is a group."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name.replace("__", "/")] = array
        file.attrs.update(attributes or {})


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an IDX file, compressed where it is called so."""
    kinds = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
    head = struct.pack(">HBB", 0, kinds[array.dtype.str[1:]], array.ndim)
    head += struct.pack(f">{array.ndim}I", *array.shape)
    content = head + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


# Sources: a read at any indices gives the rows of the array


def hdf5_source(x: np.ndarray, folder: Path, **options: Any) -> ArraySource:
    """Return the source of a data set that was written."""
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("group/x", data=x, **options)
    return Hdf5Source(folder / "a.h5", "group/x")


def npy_source(x: np.ndarray, folder: Path) -> ArraySource:
    np.save(folder / "a.npy", x)
    return open_npy(folder / "a.npy")


def npz_source(x: np.ndarray, folder: Path, save: Callable[..., None] = np.savez) -> ArraySource:
    save(folder / "a.npz", other=Y, x=x)
    return open_npz_array(folder / "a.npz", "x")


def idx_source(x: np.ndarray, folder: Path, name: str = "a-idx3-ubyte") -> ArraySource:
    write_idx(folder / name, x)
    return open_idx(folder / name)


SOURCES: dict[str, Callable[[np.ndarray, Path], ArraySource]] = {
    "hdf5 contiguous": hdf5_source,
    "hdf5 chunks": lambda x, f: hdf5_source(x, f, chunks=(8, *x.shape[1:])),
    "hdf5 one row": lambda x, f: hdf5_source(x, f, chunks=(1, *x.shape[1:])),
    "hdf5 one chunk": lambda x, f: hdf5_source(x, f, chunks=(64, 1, 4), maxshape=(64, 1, 4)),
    "hdf5 cut rows": lambda x, f: hdf5_source(x, f, chunks=(8, 1, 3)),
    "hdf5 compressed": lambda x, f: hdf5_source(x, f, chunks=(8, 1, 4), compression="gzip"),
    "hdf5 checksums": lambda x, f: hdf5_source(x, f, chunks=(8, 1, 4), fletcher32=True),
    "npy": npy_source,
    "npy fortran": lambda x, f: npy_source(np.asfortranarray(x), f),
    "npz": npz_source,
    "npz fortran": lambda x, f: npz_source(np.asfortranarray(x), f),
    "npz compressed": lambda x, f: npz_source(x, f, np.savez_compressed),
    "idx": idx_source,
    "idx gz": lambda x, f: idx_source(x, f, "a-idx3-ubyte.gz"),
}
ORDERS = {
    "shuffled": RNG.permutation(ROWS),
    "ascending": np.arange(3, 30),
    "descending": np.arange(ROWS)[::-1],
    "with gaps": np.arange(0, ROWS, 5),
    "repeated": np.array([36, 0, 36, 36, 7, 8, 7]),
    "one": np.array([36]),
    "none": np.array([], np.int64),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_read_gives_the_rows_of_the_array(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](X[:, :1], tmp_path)
    x = X[:, :1].reshape(source.shape)
    assert (len(source), source.dtype) == (ROWS, x.dtype)
    copy = pickle.loads(pickle.dumps(source))
    for order in ORDERS.values():
        rows = source.read(order)
        assert np.array_equal(rows, x[order])
        assert rows.flags.writeable
        assert np.array_equal(copy.read(order), x[order])
    for start, stop in ((0, ROWS), (5, 20), (36, 37)):
        assert np.array_equal(source.read_range(start, stop), x[start:stop])
    assert len(pickle.dumps(source)) < 1000
    source.close()
    assert np.array_equal(source.read([4]), x[[4]])


def test_several_threads_read_one_source(tmp_path: Path) -> None:
    source = hdf5_source(X, tmp_path, chunks=(8, 3, 4))
    orders = [RNG.permutation(ROWS) for _ in range(40)]
    with ThreadPoolExecutor(4) as threads:
        for order, rows in zip(orders, threads.map(source.read, orders), strict=True):
            assert np.array_equal(rows, X[order])
