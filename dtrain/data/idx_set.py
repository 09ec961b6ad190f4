"""IDX files, as MNIST has them: a header and the numbers of one array, with or without gzip.

::

    0 0 type dimensions | size of each dimension, big-endian | numbers, big-endian

Images (n, height, width) become (n, 1, height, width).
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast, final

import numpy as np

from dtrain.data.array_source import ArraySource, LazySource
from dtrain.data.conversion import Array
from dtrain.data.file_set import FileSet, SplitFiles, combine, expand_paths, no_test_split
from dtrain.data.mapped_source import MappedSource
from dtrain.data.source_dataset import SplitSources
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import Task

DTYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""Dtypes by the third byte of a file."""


READ_ERRORS = (OSError, EOFError, ValueError, struct.error, zlib.error)


SPLIT_WORDS = {"train": "train", "test": "t10k|test", "validation": "val"}
"""What the names of a split's files hold."""


@final
@dataclass(frozen=True)
class Idx(FileSet):
    """Images and labels in IDX files.

    Parameters
    ----------
    train : str or tuple of str
        File of the images, or the folder of all files, which are found by their names.
    train_y, test_y, validation_y : optional
        File of the targets. Default: the one beside the images with "labels-idx1" in place of
        "images-idx3" in its name.
    """

    train_y: str | None = None
    test_y: str | None = None
    validation_y: str | None = None

    def open_sources(self, files: Mapping[str, SplitFiles], task: Task) -> dict[str, SplitSources]:
        return {
            split: combine(self._open_parts(split, part, task.target == "data"))
            for split, part in files.items()
        }

    def open_samples(self, path: Path, folder: Path, task: Task) -> tuple[ArraySource, ...]:
        return (open_idx(find_idx_file(path, "test", "images") if path.is_dir() else path),)

    def _open_parts(self, split: str, files: SplitFiles, needs_targets: bool) -> list[SplitSources]:
        """Return what each pair of files of a split gives."""
        if files.is_shared and not files.paths[0].is_dir():
            raise no_test_split(files.paths[0], "holds the training images alone", "")
        images = [find_idx_file(p, split, "images") if p.is_dir() else p for p in files.paths]
        if not needs_targets:
            return [SplitSources(str(x), (open_idx(x),), None) for x in images]
        labels = self._label_files(split, files, images)
        pairs = zip(images, labels, strict=True)
        return [SplitSources(str(x), (open_idx(x),), open_idx(y)) for x, y in pairs]

    def _label_files(self, split: str, files: SplitFiles, images: Sequence[Path]) -> Sequence[Path]:
        """Return the files of the targets, one per file of images."""
        key, value = f"{split}-y", getattr(self, f"{split}_y")
        if value is None:
            return [labels_beside(x, key) for x in images]
        paths = expand_paths(value, files.folder, key)
        if len(paths) != len(images):
            raise ConfigError(
                "data.target-files",
                f"[data] {split} has {len(images)} files and {key} {len(paths)}: give one file of "
                "targets per file of samples",
            )
        return paths


def labels_beside(images: Path, key: str) -> Path:
    """Return the file of labels that lies beside a file of images."""
    name = re.sub(r"images([-.])idx\d", r"labels\1idx1", images.name)
    plain = name.removesuffix(".gz")
    for path in map(images.with_name, (name, plain, f"{plain}.gz")):
        if name != images.name and path.is_file():
            return path
    raise ConfigError(
        "data.no-target-files",
        f"no file of labels lies beside {images}: set {key} to the file of the targets",
    )


def find_idx_file(folder: Path, split: str, content: str) -> Path:
    """Return the file of a folder whose name holds the split and "images" or "labels".

    Raises
    ------
    DataError
        There is none, or more than one.
    """
    pattern = re.compile(rf"({SPLIT_WORDS[split]}).*{content}.*idx\d", re.IGNORECASE)
    names = sorted(path.name for path in folder.iterdir() if pattern.search(path.name))
    plain = {name.removesuffix(".gz") for name in names}
    if len(plain) != 1:
        raise DataError(
            "data.idx-files",
            f"{folder} has {len(plain)} files of the {split} {content} "
            f"({', '.join(names) or 'none'}), as t10k-{content}-idx3-ubyte: name the files by "
            "train and test",
        )
    return folder / names[0]  # the one that is not compressed


def open_idx(path: Path) -> ArraySource:
    """Return the rows of an IDX file; images get a channel.

    Raises
    ------
    DataError
        The file is missing or damaged.
    """
    try:
        with open_idx_file(path) as file:
            shape, dtype = read_idx_header(file)
            offset = file.tell()
        if len(shape) == 3:
            shape = (shape[0], 1, *shape[1:])
        if path.suffix != ".gz":
            return MappedSource(path, offset, shape, dtype, str(path))
    except READ_ERRORS as error:
        raise idx_read_error(path, error) from error
    return LazySource(shape, dtype, partial(_load, path, shape, dtype), str(path))


def _load(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    try:
        with open_idx_file(path) as file:
            read_idx_header(file)
            return np.frombuffer(file.read(), dtype).reshape(shape)
    except READ_ERRORS as error:
        raise idx_read_error(path, error) from error


def open_idx_file(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def read_idx_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    zero, kind, dimensions = struct.unpack(">HBB", file.read(4))
    if zero or kind not in DTYPES or not dimensions:
        raise ValueError("it does not begin as an IDX file does")
    sizes = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
    return sizes, np.dtype(DTYPES[kind])


def idx_read_error(path: Path, error: Exception) -> DataError:
    if not path.is_file():
        return DataError("data.file-missing", f"{path} does not exist: correct the path")
    return DataError(
        "data.file-damaged",
        f"{path} cannot be read as an IDX file ({path.stat().st_size} bytes): {error}; copy it "
        "again",
    )
