"""Rows of a plain HDF5 data set, read at their places in the file without the HDF5 library.

A data set is plain if its numbers lie in the file as they lie in memory: no filter, rows not cut
into several chunks. Random rows of it are read many times faster, since HDF5 reads a chunk for each
row::

    chunk 0   chunk 1   chunk 2      table of offsets: 96, 4192, -1 (never written: the fill value)
    rows 0-3  rows 4-7  rows 8-9     row 5 lies at 4192 + 1 x bytes of a row

Invariant: the file is only read, without a lock. Several threads may read at the same time.
"""

from __future__ import annotations

import os
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
from numpy.typing import NDArray

from dtrain.data.conversion import NUMERIC_KINDS, Array

GAP_BYTES = 2**14
"""Rows between which fewer bytes lie are read at once."""


SPAN_BYTES = 2**23
"""Most bytes of one read."""


@final
class PlainRows:
    """The rows of a plain data set.

    Parameters
    ----------
    path : Path
        The file; it stays open until `close`.
    shape, dtype
        Shape and dtype of the data set.
    offsets : array of int
        Where each chunk starts in the file; -1 where it was never written.
    chunk_rows : int
        Rows of a chunk.
    fill : number
        The value of what was never written.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        offsets: NDArray[np.int64],
        chunk_rows: int,
        fill: Any,
    ) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._offsets, self._chunk_rows, self._fill = offsets, chunk_rows, fill
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        self._descriptor = os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def close(self) -> None:
        """Close the file."""
        self._close()

    def read(self, indices: NDArray[np.int64]) -> Array:
        """Return the rows at `indices`, in their order.

        Raises
        ------
        IndexError
            There is no such row.
        OSError
            The file cannot be read, or ends too early.
        """
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.shape[0]:
            raise IndexError(f"rows of {self.shape[0]}: {indices.min()} ... {indices.max()}")
        result = np.empty((len(indices), *self.shape[1:]), self.dtype)
        chunks, inside = np.divmod(indices, self._chunk_rows)
        places = self._offsets[chunks]
        is_written = places >= 0
        if not is_written.all():
            result[~is_written] = self._fill
        order = np.flatnonzero(is_written)
        places = (places + inside * self._row_bytes)[order]
        if self._row_bytes and len(order):
            sorting = np.argsort(places, kind="stable")
            rows = result.reshape(len(indices), -1).view(np.uint8)
            self._read_sorted(rows, order[sorting], places[sorting])
        return result

    def _read_sorted(
        self, rows: NDArray[np.uint8], order: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        """Read the rows at ascending places of the file into the rows `order`."""
        gaps = np.diff(places)
        is_break = (gaps > self._row_bytes + GAP_BYTES) | (gaps % self._row_bytes != 0)
        is_break |= np.diff((places - places[0]) // SPAN_BYTES) != 0
        edges = [0, *(np.flatnonzero(is_break) + 1).tolist(), len(places)]
        steps = np.diff(order)
        for low, high in pairwise(edges):
            start, first = int(places[low]), int(order[low])
            count = (int(places[high - 1]) - start) // self._row_bytes + 1
            in_place = count == high - low and bool((steps[low : high - 1] == 1).all())
            if in_place and bool((gaps[low : high - 1] != 0).all()):
                self._read_bytes(rows[first : first + count], start)
            else:
                span = np.empty((count, self._row_bytes), np.uint8)
                self._read_bytes(span, start)
                rows[order[low:high]] = span[(places[low:high] - start) // self._row_bytes]

    def _read_bytes(self, target: NDArray[np.uint8], offset: int) -> None:
        """Fill an array with the bytes from an offset of the file on."""
        view, done = target.reshape(-1).data, 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if not count:
                raise OSError(f"the file ends at byte {offset + done}")
            done += count


def plain_rows(dataset: h5py.Dataset) -> PlainRows | None:
    """Return the rows of a data set if it is plain, else None."""
    dtype, shape, chunks = dataset.dtype, dataset.shape, dataset.chunks
    if not _is_plain(dataset):
        return None
    if chunks:
        offsets = _chunk_offsets(dataset)
    else:
        offset = dataset.id.get_offset()
        if offset is None:  # not in the file yet, or in its header
            return None
        offsets = np.array([offset], np.int64)
    try:
        fill = dataset.fillvalue
        path = Path(os.fsdecode(dataset.file.filename))
        return PlainRows(path, shape, dtype, offsets, chunks[0] if chunks else shape[0], fill)
    except (OSError, RuntimeError):  # an undefined fill value, a file that is no plain file
        return None


def _is_plain(dataset: h5py.Dataset) -> bool:
    dtype, shape, chunks = dataset.dtype, dataset.shape, dataset.chunks
    if chunks and not hasattr(dataset.id, "chunk_iter"):  # of HDF5 before 1.12.3
        return False
    if not shape or 0 in shape or dtype.kind not in NUMERIC_KINDS or dataset.is_virtual:
        return False
    if chunks and chunks[1:] != shape[1:]:  # a row lies in several chunks, or has padding
        return False
    created = dataset.id.get_create_plist()
    if created.get_nfilters() or created.get_external_count():
        return False
    if created.get_layout() not in (h5py.h5d.CHUNKED, h5py.h5d.CONTIGUOUS):
        return False
    if dataset.file.userblock_size or dataset.file.driver not in ("sec2", "stdio"):
        return False
    return bool(dataset.id.get_type().equal(h5py.h5t.py_create(dtype, logical=True)))


def _chunk_offsets(dataset: h5py.Dataset) -> NDArray[np.int64]:
    """Return where each chunk starts in the file, -1 where it was never written."""
    chunk_rows = dataset.chunks[0]
    offsets = np.full(-(-dataset.shape[0] // chunk_rows), -1, np.int64)

    def add(chunk: Any) -> None:
        number = chunk.chunk_offset[0] // chunk_rows
        if number < len(offsets):
            offsets[number] = chunk.byte_offset

    dataset.id.chunk_iter(add)
    return offsets
