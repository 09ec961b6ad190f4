"""HDF5 files as `dtrain data` writes them: complete under their names, chunks of about 1 MB.

Invariant: a file under its final name is complete, and no file is overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.hdf5_pieces import rows_per_piece, show_progress
from dtrain.data.statistics import StoredRows, compute_statistics
from dtrain.errors import ConfigError

CHUNK_BYTES = 2**20
"""Size of a chunk, unless one sample is larger."""


MAX_CHUNK_BYTES = 2**31
"""HDF5 has chunks of less than 4 GiB."""


LIBRARY_VERSION = "v108"
"""The oldest format that holds attributes of more than 64 KB: names of some 4,000 classes."""


def chunk_shape(
    shape: tuple[int, ...], dtype: np.dtype[Any], chunk_bytes: int = CHUNK_BYTES
) -> tuple[int, ...]:
    """Return chunks of whole samples: about `chunk_bytes`, and at least one sample.

    A sample of 2 GiB or more is divided along its longest axes.
    """
    sample = list(shape[1:])
    while (size := dtype.itemsize * int(np.prod(sample))) >= MAX_CHUNK_BYTES:
        longest = sample.index(max(sample))
        sample[longest] = -(-sample[longest] // 2)
    return min(shape[0], max(1, chunk_bytes // max(1, size))), *sample


def create_rows(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> h5py.Dataset:
    """Create an uncompressed dataset in chunks of whole samples."""
    return file.create_dataset(name, shape, dtype, chunks=chunk_shape(shape, dtype))


def write_pieces(target: h5py.Dataset, pieces: Iterable[Array], label: str) -> None:
    """Write samples, which come in order, and show the progress."""
    start = 0
    for piece in pieces:
        target[start : start + len(piece)] = piece
        start += len(piece)
        show_progress(label, start, len(target))
    assert start == len(target), "the source changed while it was read"


@final
class RowWriter:
    """Writes rows to an HDF5 dataset, consecutive rows together."""

    def __init__(self, target: h5py.Dataset) -> None:
        self._target = target
        self._start = 0
        self._pending_rows: list[Array] = []
        self._most_rows = rows_per_piece(target.shape, target.dtype)

    def put(self, row: int, value: Array) -> None:
        """Queue one row; write the queue first where the row does not follow or it is full."""
        pending = len(self._pending_rows)
        if row != self._start + pending or pending == self._most_rows:
            self.flush()
            self._start = row
        self._pending_rows.append(value)

    def flush(self) -> None:
        """Write the queued rows."""
        if self._pending_rows:
            rows = np.stack(self._pending_rows)
            self._target[self._start : self._start + len(rows)] = rows
            self._pending_rows = []


def add_statistics(files: list[h5py.File]) -> None:
    """Write mean and standard deviation of the first file's `x` into all files.

    They are left out where they are not finite, as training refuses them.
    """
    rows = files[0]["x"]
    if rows.dtype.kind == "c":
        return
    report = partial(show_progress, "statistics")
    statistics = compute_statistics(StoredRows(rows), stored_units=True, report=report)
    if np.isfinite(statistics.moments).all():
        for file in files:
            file.attrs["mean"], file.attrs["std"] = statistics.moments


@contextmanager
def atomic_files(paths: list[Path], **options: Any) -> Iterator[list[h5py.File]]:
    """Open files under temporary names; rename them to `paths` when all are complete.

    Raises
    ------
    ConfigError
        A file cannot be written, as on a full disk.
    """
    drafts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    options = {"locking": False, "libver": (LIBRARY_VERSION, LIBRARY_VERSION)} | options
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(h5py.File(draft, "w", **options)) for draft in drafts]
        for draft, path in zip(drafts, paths, strict=True):
            draft.rename(path)
    except (OSError, RuntimeError) as error:
        text = str(error).strip().splitlines()[0]
        raise ConfigError(
            "import.output-unwritable",
            f"cannot write {paths[0]}: {text}; make space, or choose another folder",
        ) from error
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Refuse a path that exists or whose folder does not."""
    if path.exists():
        raise ConfigError(
            "import.output-exists",
            f"{path} exists and is never overwritten: delete it, or choose another name",
        )
    if not path.parent.is_dir():
        raise ConfigError(
            "import.folder-missing",
            f"{path}: there is no folder {path.parent}: create it first",
        )
