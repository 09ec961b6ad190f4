"""`.npz` and `.npy` files of numpy as streams of rows.

Invariant: nothing is unpickled, and no member of an archive is written to disk.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.hdf5_pieces import rows_per_piece
from dtrain.data.importing.array_stream import (
    ArrayStream,
    StreamedSplit,
    read_raw,
    refuse_objects,
    shorten,
)
from dtrain.errors import DataError

SPLIT_NAMES = {
    "train": ("train",),
    "test": ("test",),
    "validation": ("validation", "valid", "val"),
}
"""The endings of arrays' names by split: x_train, y_val."""


READ_ERRORS = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError)


Header = tuple[tuple[int, ...], bool, np.dtype[Any]]
"""Shape, whether the columns come first in the file (Fortran order), dtype."""


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
    """Return the arrays of a `.npz` file by name."""
    arrays = {}
    try:
        with zipfile.ZipFile(source) as archive:
            for member in archive.namelist():
                if member.endswith(".npy"):
                    name = member.removesuffix(".npy")
                    with archive.open(member) as file:
                        header = read_header(file)
                    arrays[name] = _npz_stream(source, name, header)
    except READ_ERRORS as error:
        raise _damaged(f"{source}", error) from error
    return arrays


def open_npy(source: Path) -> ArrayStream:
    """Return the array of a `.npy` file, which is mapped into memory."""
    try:
        with source.open("rb") as file:
            shape, _, dtype = read_header(file)
    except READ_ERRORS as error:
        raise _damaged(str(source), error) from error

    def pieces() -> Iterator[Array]:
        refuse_objects(dtype, str(source))
        try:
            rows = np.load(source, mmap_mode="r", allow_pickle=False)
        except READ_ERRORS as error:
            raise _damaged(str(source), error) from error
        step = rows_per_piece(shape, dtype)
        for start in range(0, len(rows), step):
            piece = np.ascontiguousarray(rows[start : start + step])
            yield piece.astype(dtype.newbyteorder("="), copy=False)

    return ArrayStream(str(source), shape, dtype.newbyteorder("="), pieces)


def read_header(file: IO[bytes]) -> Header:
    """Read the header of the `.npy` format."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"its version of the format is {version}, for names of fields")


def _npz_stream(source: Path, name: str, header: Header) -> ArrayStream:
    shape, columns_first, dtype = header
    location = f"{source}: {name}"

    def pieces() -> Iterator[Array]:
        refuse_objects(dtype, location)
        try:
            with zipfile.ZipFile(source) as archive, archive.open(f"{name}.npy") as file:
                if not columns_first or len(shape) < 2:
                    read_header(file)
                    yield from read_raw(file, shape, dtype, location)
                    return
            # Rows of columns are spread over the whole member: it is read at once.
            with np.load(source, allow_pickle=False) as arrays:
                yield np.ascontiguousarray(arrays[name]).astype(dtype.newbyteorder("="))
        except READ_ERRORS as error:
            raise _damaged(location, error) from error

    return ArrayStream(location, shape, dtype.newbyteorder("="), pieces)


def _damaged(location: str, error: Exception) -> DataError:
    return DataError(
        "import.file-damaged",
        f"{location} cannot be read as a file of numpy: {error}; make or copy it again",
    )
