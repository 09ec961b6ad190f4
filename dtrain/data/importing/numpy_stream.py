"""`.npz` and `.npy` files of numpy as streams of rows: also compressed ones larger than memory.

Invariant: nothing is unpickled, and no member of an archive is written to disk.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from dtrain.data.array_source import ArraySource
from dtrain.data.conversion import Array
from dtrain.data.hdf5_pieces import rows_per_piece
from dtrain.data.importing.array_stream import ArrayStream, StreamedSplit, read_raw, shorten
from dtrain.data.npy_source import (
    check_npy_header,
    open_npy,
    open_npz_array,
    read_npy_header,
    reading_numpy,
)
from dtrain.errors import DataError

SPLIT_NAMES = {
    "train": ("train",),
    "test": ("test",),
    "validation": ("validation", "valid", "val"),
}
"""The endings of arrays' names by split: x_train, y_val."""


def open_npz(source: Path, x: str | None, y: str | None) -> list[StreamedSplit]:
    """Return the splits of a `.npz` file.

    Parameters
    ----------
    x, y : str, optional
        Names of the arrays of the only split. Default: x_train and y_train, and those of the other
        splits that are there; or x and y.
    """
    arrays = npz_arrays(source)
    if x is not None or y is not None:
        names = {"train": (x or "x", y or "y")}
    else:
        names = {
            split: (f"x_{ending}", f"y_{ending}")
            for split, endings in SPLIT_NAMES.items()
            for ending in endings
            if f"x_{ending}" in arrays
        }
        if "train" not in names:
            names = {"train": ("x", "y")}
    for name in (name for pair in names.values() for name in pair):
        if name not in arrays:
            raise DataError(
                "import.array-missing",
                f"{source} has no array '{name}', only {shorten(list(arrays))}: choose two by --x "
                "NAME --y NAME",
            )
    return [StreamedSplit(split, arrays[x], arrays[y]) for split, (x, y) in names.items()]


def npz_arrays(source: Path) -> dict[str, ArrayStream]:
    """Return the arrays of a `.npz` file by name; those of objects cannot be read.

    Raises
    ------
    DataError
        The file is missing or damaged.
    """
    with reading_numpy(source), zipfile.ZipFile(source) as archive:
        names = [member.removesuffix(".npy") for member in archive.namelist()]
        return {name: _npz_stream(source, name, archive) for name in names}


def stream_npy(source: Path) -> ArrayStream:
    """Return the array of a `.npy` file.

    Raises
    ------
    DataError
        The file is missing or damaged, or holds objects.
    """
    return _stream_source(open_npy(source))


def _npz_stream(source: Path, name: str, archive: zipfile.ZipFile) -> ArrayStream:
    member = f"{name}.npy"
    with archive.open(member) as file:
        header = read_npy_header(file)
    location = f"{source} '{name}'"

    def pieces() -> Iterator[Array]:
        check_npy_header(header, location)
        is_stored = archive.getinfo(member).compress_type == zipfile.ZIP_STORED
        if is_stored or (header.is_fortran and len(header.shape) > 1):
            yield from _source_pieces(open_npz_array(source, name))
            return
        with reading_numpy(source), zipfile.ZipFile(source) as reader, reader.open(member) as file:
            read_npy_header(file)
            yield from read_raw(file, header.shape, header.dtype, location)

    return ArrayStream(location, header.shape, header.dtype.newbyteorder("="), pieces)


def _stream_source(source: ArraySource) -> ArrayStream:
    dtype = source.dtype.newbyteorder("=")
    return ArrayStream(source.location, source.shape, dtype, lambda: _source_pieces(source))


def _source_pieces(source: ArraySource) -> Iterator[Array]:
    """Yield the rows of a source in order."""
    dtype, step = source.dtype.newbyteorder("="), rows_per_piece(source.shape, source.dtype)
    for start in range(0, len(source), step):
        rows = source.read_range(start, min(start + step, len(source)))
        yield rows.astype(dtype, copy=False)
