"""Copies of HDF5 files whose chunks hold few whole samples, for reading in a shuffled order.

A chunk is read and decoded as a whole, so one sample of a chunk of 10,000 costs 10,000. The copy
reads each chunk of the source once::

    source   | chunk of 10,000 rows       | chunk of 10,000 rows       |    in this order
    copy     | 40 | 40 | 40 | ...                                      |    about 1 MB each

Invariant: one chunk of the source and some megabytes are in memory at a time, whatever the size of
the arrays; a file under its final name is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, final

import h5py
import numpy as np

from dtrain.data.hdf5_pieces import open_for_pieces, show_progress
from dtrain.data.hdf5_source import Hdf5Source, read_error
from dtrain.data.hdf5_writer import (
    CHUNK_BYTES,
    atomic_files,
    chunk_shape,
    require_writable,
)
from dtrain.errors import ConfigError

Compression = Literal["none", "gzip", "lzf"]


Region = tuple[slice, ...]


REGION_BYTES = 32 * 2**20
"""Size of what is copied at once."""


def rechunk(
    source: Path,
    out: Path,
    chunk_bytes: int = CHUNK_BYTES,
    compression: Compression = "none",
) -> Path:
    """Copy an HDF5 file with all groups, attributes and links; return the path of the copy.

    Parameters
    ----------
    chunk_bytes : int
        Size of a chunk, unless one sample is larger.

    Raises
    ------
    ConfigError
        `out` exists or cannot be written, or `chunk_bytes` is not positive.
    DataError
        `source` is missing or damaged.
    """
    if chunk_bytes < 1:
        raise ConfigError(
            "data.chunk-bytes", f"--chunk-bytes {chunk_bytes}: give at least 1, as {CHUNK_BYTES}"
        )
    require_writable(out)
    with open_for_pieces(source) as file, atomic_files([out], rdcc_nbytes=REGION_BYTES) as [target]:
        _Copy(source, chunk_bytes, compression, out).group(file, target)
    return out


@final
class _Copy:
    """One copy of a file."""

    def __init__(self, source: Path, chunk_bytes: int, compression: Compression, out: Path) -> None:
        self.source, self.chunk_bytes, self.out = source, chunk_bytes, out
        self.filters: dict[str, Any] = {}
        if compression != "none":
            self.filters = {"compression": compression, "shuffle": True}
        self._copied: dict[Any, str] = {}

    def group(self, source: h5py.Group, target: h5py.Group) -> None:
        """Copy the members and the attributes of a group."""
        _copy_attributes(source, target)
        for name in source:
            link = source.get(name, getlink=True)
            if isinstance(link, h5py.SoftLink):
                target[name] = link
                continue
            if isinstance(link, h5py.ExternalLink):
                linked = os.path.relpath(self.source.parent / link.filename, self.out.parent)
                target[name] = h5py.ExternalLink(linked, link.path)
                continue
            item = source[name]
            address = h5py.h5o.get_info(item.id).addr
            if address in self._copied:  # another name of the same object
                target[name] = target.file[self._copied[address]]
                continue
            self._copied[address] = f"{target.name.rstrip('/')}/{name}"
            if isinstance(item, h5py.Group):
                self.group(item, target.create_group(name))
            elif isinstance(item, h5py.Dataset) and _is_array(item):
                self.array(item, target, name)
            else:
                source.copy(item, target, name)

    def array(self, rows: h5py.Dataset, target: h5py.Group, name: str) -> None:
        """Copy an array of numbers."""
        Hdf5Source(self.source, rows.name)  # refuses a virtual data set without its files
        if self.filters and _crosses_chunks(rows):
            draft = self.out.with_name(f".{self.out.name}.{os.getpid()}.draft")
            try:
                with h5py.File(draft, "w", locking=False) as file:
                    whole = self._create(rows, file, "rows", {})
                    _copy_regions(rows, whole)
                    _copy_regions(whole, self._create(rows, target, name, self.filters))
            finally:
                draft.unlink(missing_ok=True)
        else:
            _copy_regions(rows, self._create(rows, target, name, self.filters))
        _copy_attributes(rows, target[name])

    def _create(
        self, rows: h5py.Dataset, group: h5py.Group, name: str, filters: dict[str, Any]
    ) -> h5py.Dataset:
        return group.create_dataset(
            name,
            rows.shape,
            rows.dtype,
            chunks=chunk_shape(rows.shape, rows.dtype, self.chunk_bytes),
            maxshape=rows.maxshape,
            fillvalue=rows.fillvalue,
            **filters,
        )


def copy_regions(rows: h5py.Dataset) -> Iterator[Region]:
    """Yield regions that cover an array, those of one chunk one after another.

    A region is at most `REGION_BYTES` large, or one row of a chunk.
    """
    shape, chunks = rows.shape, rows.chunks or (1, *rows.shape[1:])
    row_bytes = rows.dtype.itemsize * int(np.prod(shape[1:]))
    if row_bytes * chunks[0] <= REGION_BYTES:  # whole samples, and whole chunks
        step = chunks[0] * max(1, REGION_BYTES // (row_bytes * chunks[0]))
        for start in range(0, shape[0], step):
            yield (slice(start, min(start + step, shape[0])),)
        return
    step = max(1, REGION_BYTES // (rows.dtype.itemsize * int(np.prod(chunks[1:]))))
    starts = [range(0, length, size) for length, size in zip(shape, chunks, strict=True)]
    for corner in product(*starts):
        stops = [min(a + c, n) for a, c, n in zip(corner, chunks, shape, strict=True)]
        inner = tuple(slice(a, b) for a, b in zip(corner[1:], stops[1:], strict=True))
        for start in range(corner[0], stops[0], step):
            yield (slice(start, min(start + step, stops[0])), *inner)


def _copy_regions(rows: h5py.Dataset, target: h5py.Dataset) -> None:
    total, done = rows.size, 0
    for region in copy_regions(rows):
        try:
            values = rows[region]
        except (OSError, RuntimeError) as error:
            raise read_error(Path(rows.file.filename), error) from error
        target[region] = values
        done += values.size
        show_progress(rows.name, done, total)


def _crosses_chunks(rows: h5py.Dataset) -> bool:
    """Return whether the source's chunks hold parts of samples and are copied one by one.

    Compressed chunks of the copy would be decoded and encoded again for each of them.
    """
    return bool(rows.chunks) and rows.chunks[1:] != rows.shape[1:]


def _is_array(item: h5py.Dataset) -> bool:
    """Return whether a dataset is one of numbers or fixed strings, not empty and not one value."""
    return bool(item.shape) and item.size > 0 and not item.dtype.hasobject


def _copy_attributes(source: h5py.HLObject, target: h5py.HLObject) -> None:
    """Copy attributes with their dtypes, but references, which point into the source."""
    for name in source.attrs:
        attribute = source.attrs.get_id(name)
        if _holds_references(attribute.dtype):
            continue
        value = source.attrs[name]
        if isinstance(value, h5py.Empty):
            target.attrs[name] = value
        else:
            target.attrs.create(name, value, attribute.shape, attribute.dtype)


def _holds_references(dtype: np.dtype[Any]) -> bool:
    """Return whether an attribute points to other objects of its file."""
    fields = [field[0] for field in (dtype.fields or {}).values()]
    parts = [h5py.check_vlen_dtype(dtype), *fields]
    is_reference = h5py.check_ref_dtype(dtype) is not None
    return is_reference or any(_holds_references(p) for p in parts if isinstance(p, np.dtype))
