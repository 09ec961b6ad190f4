"""HDF5 datasets read in order, piece by piece.

Invariant: each chunk is read and decoded once, and one chunk and one piece are in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.hdf5_source import open_hdf5, read_error

PIECE_BYTES = 4 * 2**20
"""Size of what is read and written at once, unless one sample is larger."""


@contextmanager
def open_for_pieces(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading with a cache that holds a whole chunk.

    A chunk that is larger than the cache is decoded again for each piece of it.

    Raises
    ------
    DataError
        The file is missing or damaged.
    """
    sizes = [PIECE_BYTES]

    def add(_: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset) and item.chunks:
            sizes.append(item.dtype.itemsize * int(np.prod(item.chunks, dtype=np.int64)))

    with open_hdf5(path) as file:
        file.visititems(add)
    try:
        with h5py.File(path, "r", locking=False, rdcc_nbytes=max(sizes)) as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise read_error(path, error) from error


def rows_per_piece(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return the number of samples in about `PIECE_BYTES`, at least 1."""
    return max(1, PIECE_BYTES // max(1, dtype.itemsize * int(np.prod(shape[1:]))))


def read_pieces(rows: h5py.Dataset, label: str | None = None) -> Iterator[Array]:
    """Yield the samples of a dataset in order, `PIECE_BYTES` at a time.

    Parameters
    ----------
    label : str, optional
        Show the progress under this label.
    """
    step = rows_per_piece(rows.shape, rows.dtype)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
        if label is not None:
            show_progress(label, min(start + step, len(rows)), len(rows))


def show_progress(label: str, count: int, total: int | None = None) -> None:
    """Print the progress, on a terminal only."""
    if sys.stderr.isatty():
        of = f" of {total:,}" if total else ""
        end = "\n" if count == total else ""
        print(f"\r{label}: {count:,}{of}", end=end, file=sys.stderr, flush=True)
