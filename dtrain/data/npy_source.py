"""Arrays of `.npy` and `.npz` files as array sources.

An array of a `.npy` file, or of a `.npz` file that is not compressed, is read through a memory map;
a compressed one is read as a whole on first need. Nothing is unpickled.

::

    .npz (a zip)   | header of x.npy | npy header | numbers of x | header of y.npy | ...
                                                  ^ offset of the map
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format

from dtrain.data.array_source import ArraySource, LazySource
from dtrain.data.conversion import Array
from dtrain.data.mapped_source import MappedSource
from dtrain.errors import DataError

READ_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, struct.error)


LOCAL_HEADER = struct.Struct("<26x2H")
"""Header of a member of a zip: the lengths of its name and of its extra field are at the end."""


class Header(NamedTuple):
    """What stands before the numbers of a `.npy` file."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]


def open_npy(path: Path) -> ArraySource:
    """Return the rows of a `.npy` file.

    Raises
    ------
    DataError
        The file is missing or damaged, or holds objects.
    """
    with reading_numpy(path), path.open("rb") as file:
        header = read_npy_header(file)
        offset = file.tell()
    return _mapped(path, offset, header, str(path))


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays of a `.npz` file by name.

    Raises
    ------
    DataError
        The file is missing or damaged.
    """
    shapes = {}
    with reading_numpy(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                shapes[member.removesuffix(".npy")] = read_npy_header(file).shape
    return shapes


def has_npz_array(path: Path, name: str) -> bool:
    """Return whether a `.npz` file has an array of this name.

    Raises
    ------
    DataError
        The file is missing or damaged.
    """
    with reading_numpy(path), zipfile.ZipFile(path) as archive:
        return f"{name}.npy" in archive.namelist()


def open_npz_array(path: Path, name: str) -> ArraySource:
    """Return the rows of an array of a `.npz` file.

    Raises
    ------
    DataError
        The file is missing or damaged, or the array holds objects.
    """
    location = f"{path} '{name}'"
    with reading_numpy(path), zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as file:
            header = read_npy_header(file)
            header_bytes = file.tell()
        if member.compress_type == zipfile.ZIP_STORED:
            offset = _member_offset(path, member) + header_bytes
            return _mapped(path, offset, header, location)
    check_npy_header(header, location)
    return LazySource(header.shape, header.dtype, partial(_load_member, path, name), location)


def _load_member(path: Path, name: str) -> Array:
    with reading_numpy(path), np.load(path, allow_pickle=False) as arrays:
        return np.ascontiguousarray(arrays[name])


def _mapped(path: Path, offset: int, header: Header, location: str) -> MappedSource:
    check_npy_header(header, location)
    return MappedSource(
        path, offset, header.shape, header.dtype, location, is_fortran=header.is_fortran
    )


def read_npy_header(file: IO[bytes]) -> Header:
    version = npy_format.read_magic(file)
    if version == (1, 0):
        return Header(*npy_format.read_array_header_1_0(file))
    return Header(*npy_format.read_array_header_2_0(file))  # version 3 differs in names of fields


def _member_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Return the byte of a zip at which the content of a member starts."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    return int(member.header_offset + LOCAL_HEADER.size + name + extra)


def check_npy_header(header: Header, location: str) -> None:
    """Refuse what is no array of samples."""
    if header.dtype.hasobject:
        raise DataError(
            "data.objects",
            f"{location} holds Python objects, which are not read since they may run code: save "
            "an array of numbers",
        )
    if not header.shape:
        raise DataError(
            "data.single-number", f"{location} is a single number: save an array (samples, ...)"
        )


@contextmanager
def reading_numpy(path: Path) -> Iterator[None]:
    """Turn the errors of a read into those of the data.

    Raises
    ------
    DataError
        The file is missing or damaged.
    """
    try:
        yield
    except READ_ERRORS as error:
        if not path.is_file():
            raise DataError(
                "data.file-missing", f"{path} does not exist: correct the path"
            ) from error
        raise DataError(
            "data.file-damaged",
            f"{path} cannot be read as a file of numpy ({path.stat().st_size} bytes): {error}; "
            "copy or save it again",
        ) from error
