"""IDX files, as those of MNIST, compressed by gzip or not.

::

    0 0 | code of the dtype | number of axes | lengths of the axes, 4 bytes each | numbers

All numbers have the highest byte first.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.importing.array_stream import ArrayStream, StreamedSplit, read_raw, shorten
from dtrain.errors import DataError

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


NAME = re.compile(
    r"(?P<set>.*?)(?P<split>train|t10k|test)[-_.](?P<part>images|labels)[-_.]idx\d-ubyte(\.gz)?"
)
"""train-images-idx3-ubyte, t10k-labels.idx1-ubyte.gz, emnist-letters-train-images-idx3-ubyte."""


GZIP_MAGIC = b"\x1f\x8b"


READ_ERRORS = (OSError, EOFError, zlib.error, struct.error)


def is_idx(source: Path) -> bool:
    """Return whether a file begins as an IDX file, or a folder has one of MNIST's names."""
    if source.is_dir():
        return any(NAME.fullmatch(path.name) for path in source.iterdir())
    try:
        with _open(source) as file:
            magic = file.read(4)
    except READ_ERRORS:
        return False
    return len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in DTYPES and 0 < magic[3] < 9


def open_idx_folder(folder: Path) -> list[StreamedSplit]:
    """Return the splits of a folder with MNIST's files, found by their names."""
    files: dict[tuple[str, str], Path] = {}
    sets = set()
    for path in sorted(folder.iterdir(), reverse=True):  # a name without .gz comes last and counts
        match = NAME.fullmatch(path.name)
        if match:
            split = "train" if match["split"] == "train" else "test"
            files[split, match["part"]] = path
            sets.add(match["set"])
    if len(sets) > 1:
        raise DataError(
            "import.idx-ambiguous",
            f"{folder} has the files of {len(sets)} sets ({shorten(sorted(sets))}): put those of "
            "one set into a folder, or give one file of images",
        )
    splits = []
    for split in ("train", "test"):
        parts = [files.get((split, part)) for part in ("images", "labels")]
        images, labels = parts
        if images is not None and labels is not None:
            splits.append(StreamedSplit(split, _with_channel(open_idx(images)), open_idx(labels)))
        elif any(parts) or split == "train":
            raise DataError(
                "import.idx-missing",
                f"{folder} has not both images and labels of the split '{split}': add the missing "
                "file, as train-labels-idx1-ubyte",
            )
    return splits


def open_idx_split(source: Path, labels: Path | None) -> list[StreamedSplit]:
    """Return the only split: a file of samples and a file of labels.

    Parameters
    ----------
    labels : Path, optional
        Default: the file beside `source` whose name has "labels" in the place of "images".
    """
    if labels is None:
        name = re.sub(r"idx\d", "idx1", source.name.replace("images", "labels"))
        labels = source.with_name(name)
        if labels == source or not labels.is_file():
            raise DataError(
                "import.targets-missing",
                f"{source}: no file {labels.name} with labels is beside it: name one by --y FILE",
            )
    return [StreamedSplit("train", _with_channel(open_idx(source)), open_idx(labels))]


def open_idx(source: Path) -> ArrayStream:
    """Return the array of an IDX file.

    Raises
    ------
    DataError
        The file is missing, damaged or of another format.
    """
    try:
        with _open(source) as file:
            shape, dtype = _read_header(file)
    except (*READ_ERRORS, KeyError) as error:
        raise _damaged(source, error) from error

    def pieces() -> Iterator[Array]:
        try:
            with _open(source) as file:
                _read_header(file)
                yield from read_raw(file, shape, dtype, str(source))
        except READ_ERRORS as error:
            raise _damaged(source, error) from error

    return ArrayStream(str(source), shape, dtype.newbyteorder("="), pieces)


def _with_channel(images: ArrayStream) -> ArrayStream:
    """Return grey images (n, H, W) as (n, 1, H, W)."""
    if images.ndim != 3:
        return images
    return replace(
        images,
        shape=(images.shape[0], 1, *images.shape[1:]),
        pieces=lambda: (piece[:, np.newaxis] for piece in images.pieces()),
    )


@contextmanager
def _open(source: Path) -> Iterator[IO[bytes]]:
    with source.open("rb") as file:
        is_compressed = file.read(2) == GZIP_MAGIC
    with gzip.open(source) if is_compressed else source.open("rb") as stream:
        yield stream  # type: ignore[misc]


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    zeros, code, axes = struct.unpack(">HBB", file.read(4))
    if zeros or not axes:
        raise KeyError("it does not begin as an IDX file")
    return struct.unpack(f">{axes}I", file.read(4 * axes)), np.dtype(DTYPES[code])


def _damaged(source: Path, error: Exception) -> DataError:
    return DataError(
        "import.file-damaged",
        f"{source} cannot be read as an IDX file: {error}; make or copy it again",
    )
