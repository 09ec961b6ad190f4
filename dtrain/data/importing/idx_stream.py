"""IDX files, as those of MNIST, as streams of rows: also compressed ones larger than memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dtrain.data.conversion import Array
from dtrain.data.idx_set import (
    READ_ERRORS,
    SPLIT_WORDS,
    find_idx_file,
    idx_read_error,
    labels_beside,
    open_idx_file,
    read_idx_header,
)
from dtrain.data.importing.array_stream import ArrayStream, StreamedSplit, read_raw
from dtrain.errors import ConfigError, DataError


def is_idx(source: Path) -> bool:
    """Return whether a file begins as an IDX file, or a folder has one of MNIST's names."""
    if source.is_dir():
        return any(_has_split(source, split) for split in SPLIT_WORDS)
    try:
        with open_idx_file(source) as file:
            read_idx_header(file)
    except READ_ERRORS:
        return False
    return True


def open_idx_folder(folder: Path) -> list[StreamedSplit]:
    """Return the splits of a folder with MNIST's files, found by their names."""
    splits = [split for split in SPLIT_WORDS if split == "train" or _has_split(folder, split)]
    files = [
        [find_idx_file(folder, split, part) for part in ("images", "labels")] for split in splits
    ]
    return [
        StreamedSplit(split, stream_idx(images), stream_idx(labels))
        for split, (images, labels) in zip(splits, files, strict=True)
    ]


def open_idx_split(source: Path, labels: Path | None) -> list[StreamedSplit]:
    """Return the only split: a file of samples and a file of labels.

    Parameters
    ----------
    labels : Path, optional
        Default: the file beside `source` whose name has "labels" in the place of "images".
    """
    try:
        y = labels_beside(source, "--y") if labels is None else labels
    except ConfigError as error:
        raise DataError("import.targets-missing", error.message) from None
    return [StreamedSplit("train", stream_idx(source), stream_idx(y))]


def stream_idx(source: Path) -> ArrayStream:
    """Return the array of an IDX file; grey images (n, H, W) as (n, 1, H, W).

    Raises
    ------
    DataError
        The file is missing, damaged or of another format.
    """
    try:
        with open_idx_file(source) as file:
            shape, dtype = read_idx_header(file)
    except READ_ERRORS as error:
        raise idx_read_error(source, error) from error
    if len(shape) == 3:
        shape = (shape[0], 1, *shape[1:])

    def pieces() -> Iterator[Array]:
        try:
            with open_idx_file(source) as file:
                read_idx_header(file)
                yield from read_raw(file, shape, dtype, str(source))
        except READ_ERRORS as error:
            raise idx_read_error(source, error) from error

    return ArrayStream(str(source), shape, dtype.newbyteorder("="), pieces)


def _has_split(folder: Path, split: str) -> bool:
    pattern = re.compile(rf"({SPLIT_WORDS[split]}).*(images|labels).*idx\d", re.IGNORECASE)
    return any(pattern.search(path.name) for path in folder.iterdir())
