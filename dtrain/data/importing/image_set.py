"""Import of image folders and tars of them.

Two passes. The first reads names and headers, which give the order of rows, their size and mode,
so that mistakes are reported before anything is written. The second writes pixels into the file::

    train/b/1.png   train/a/2.png   train/a/1.png        in the source's order
    row 2           row 1           row 0                classes, then names, in alphabetical order

Invariant: the same images give the same files, whatever the source's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import final

import h5py
import numpy as np

from dtrain.data.hdf5_pieces import show_progress
from dtrain.data.hdf5_writer import RowWriter, create_rows
from dtrain.data.importing.array_stream import shorten
from dtrain.data.importing.image_files import (
    DEEP_DTYPES,
    Fit,
    Header,
    PathParts,
    PixelFormat,
    iter_images,
    read_header,
    read_pixels,
)
from dtrain.errors import DataError

GREY_MODES = {"1", "L", "LA"}


SPLITS = ("train", "test")


PROGRESS_EVERY = 1000


def open_images(
    source: Path, split: str | None, size: tuple[int, int] | None, fit: Fit
) -> ImageSet:
    """Return the images of class folders, checked by their headers.

    Parameters
    ----------
    source : Path
        A folder of class folders, or a tar of one; nothing is extracted to disk.
    split : str, optional
        Take only this sub-folder.
    size : (int, int), optional
        (height, width) that all images get by `fit`. Default: they must have one size.

    Raises
    ------
    DataError
        Pillow is not installed; or the source has no images, images of several sizes without
        `size`, or is damaged.
    """
    if find_spec("PIL") is None:
        raise DataError(
            "import.pillow-missing", "importing images needs Pillow: pip install 'dtrain[images]'"
        )
    headers = _read_headers(source)
    splits = _splits(headers, split, source)
    used = {path: headers[path] for import_split in splits for path in import_split.rows}
    return ImageSet(source, tuple(splits), _pixel_format(used, size, fit))


@final
@dataclass(frozen=True)
class ImageSet:
    """Images of class folders.

    Attributes
    ----------
    splits : tuple of ImportSplit
        One split, or the training and the test split.
    """

    source: Path
    splits: tuple[ImportSplit, ...]
    form: PixelFormat

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the splits, one for each file."""
        return SPLITS[: len(self.splits)]

    def write(self, files: list[h5py.File]) -> None:
        """Decode every image into its row; write labels and names of the classes."""
        for file, split in zip(files, self.splits, strict=True):
            shape = (len(split.rows), *self.form.shape)
            create_rows(file, "x", shape, self.form.dtype)
            file["y"] = np.asarray(split.labels, np.int64)
            file.attrs["classes"] = list(self.splits[0].classes)
        self._write_pixels([RowWriter(file["x"]) for file in files])

    def _write_pixels(self, writers: list[RowWriter]) -> None:
        total, done = sum(len(split.rows) for split in self.splits), 0
        for path, opener in iter_images(self.source):
            for split, writer in zip(self.splits, writers, strict=True):
                if path in split.rows:
                    location = _location(self.source, path)
                    writer.put(split.rows[path], read_pixels(opener, self.form, location))
                    done += 1
                    if done % PROGRESS_EVERY == 0 or done == total:
                        show_progress("images", done, total)
        for writer in writers:
            writer.flush()
        assert done == total, "the source changed while it was read"


@final
@dataclass(frozen=True)
class ImportSplit:
    """The rows of one file.

    Attributes
    ----------
    rows : dict
        The row of each image, by its whole path.
    classes : tuple of str
        Names in the order of the labels.
    labels : tuple of int
        Label of each row.
    """

    rows: dict[PathParts, int]
    classes: tuple[str, ...]
    labels: tuple[int, ...]


def _read_headers(source: Path) -> dict[PathParts, Header]:
    """Read the headers of all images; refuse a path that occurs twice."""
    headers: dict[PathParts, Header] = {}
    for path, opener in iter_images(source):
        location = _location(source, path)
        if path in headers:
            raise DataError("import.image-twice", f"{location} occurs twice: remove one of them")
        headers[path] = read_header(opener, location)
        if len(headers) % PROGRESS_EVERY == 0:
            show_progress("headers", len(headers))
    if not headers:
        raise DataError(
            "import.no-images", f"{source} has no images: arrange them as <class>/<image>"
        )
    return headers


def _splits(headers: dict[PathParts, Header], split: str | None, source: Path) -> list[ImportSplit]:
    """Return one split, or the training and the test split."""
    paths = sorted(headers)
    depth = _outer_depth(paths, split)
    tops = sorted({path[depth] for path in paths})
    if split is not None:
        if split not in tops:
            raise DataError(
                "import.split-missing",
                f"{source} has no folder '{split}': choose one of {shorten(tops)}",
            )
        return [_make_split(paths, depth, split, source)]
    if set(SPLITS) <= set(tops):
        train, test = (_make_split(paths, depth, name, source) for name in SPLITS)
        return [train, _relabel(test, train.classes, source)]
    if all(len(path) == depth + 3 for path in paths):
        raise DataError(
            "import.split-ambiguous",
            f"{source}: found {shorten(tops)} with folders inside, but not both train and test: "
            f"choose one with --split NAME",
        )
    return [_make_split(paths, depth, None, source)]


def _outer_depth(paths: list[PathParts], split: str | None) -> int:
    """Return the number of outer folders around everything: 1 in cifar/train/airplane/1.png."""
    depth = 0
    while (
        all(len(path) > depth + 2 for path in paths)
        and len({path[depth] for path in paths}) == 1
        and paths[0][depth] not in (*SPLITS, split)
    ):
        depth += 1
    return depth


def _make_split(paths: list[PathParts], depth: int, name: str | None, source: Path) -> ImportSplit:
    """Return the split below folder `name` (None: below no folder), in alphabetical order."""
    if name is not None:
        paths, depth = [path for path in paths if path[depth] == name], depth + 1
    for path in paths:
        if len(path) != depth + 2:
            raise DataError(
                "import.image-misplaced",
                f"{_location(source, path)} is at {'/'.join(path[depth:])}: move it to "
                "<class>/<image>",
            )
    classes = sorted({path[depth] for path in paths})
    labels = {label: number for number, label in enumerate(classes)}
    return ImportSplit(
        {path: row for row, path in enumerate(paths)},
        tuple(classes),
        tuple(labels[path[depth]] for path in paths),
    )


def _relabel(test: ImportSplit, classes: tuple[str, ...], source: Path) -> ImportSplit:
    """Renumber the test split's labels by the training split's classes."""
    unknown = [name for name in test.classes if name not in classes]
    if unknown:
        raise DataError(
            "import.class-unknown",
            f"{source}: classes {shorten(unknown)} of test are not in train, which has "
            f"{shorten(list(classes))}: remove them from test or add them to train",
        )
    numbers = [classes.index(name) for name in test.classes]
    return ImportSplit(test.rows, classes, tuple(numbers[label] for label in test.labels))


def _pixel_format(
    headers: dict[PathParts, Header], size: tuple[int, int] | None, fit: Fit
) -> PixelFormat:
    """Return the form of all images; refuse sizes or depths that differ."""
    mode = _common_mode(headers)
    if size is not None:
        return PixelFormat(mode, size, fit)
    first = next(iter(headers))
    width, height = headers[first][0]
    for path, (other, _) in headers.items():
        if other != (width, height):
            raise DataError(
                "import.sizes-differ",
                f"{'/'.join(path)} is {other[1]}x{other[0]} and {'/'.join(first)} is "
                f"{height}x{width} (height x width): give one size for all images, as --size "
                f"{height}x{width}",
            )
    return PixelFormat(mode, (height, width))


def _common_mode(headers: dict[PathParts, Header]) -> str:
    """Return the mode to convert all images to."""
    by_mode = {mode: path for path, (_, mode) in reversed(headers.items())}
    deep = [mode for mode in by_mode if mode in DEEP_DTYPES]
    if not deep:
        return "L" if by_mode.keys() <= GREY_MODES else "RGB"
    if len(by_mode) > 1:
        described = (f"{'/'.join(path)} has mode {mode}" for mode, path in sorted(by_mode.items()))
        raise DataError(
            "import.image-depth",
            f"{', '.join(described)}: images of more than 8 bits must all have the same mode; "
            "convert the others",
        )
    return deep[0]


def _location(source: Path, path: PathParts) -> str:
    return f"{source}: {'/'.join(path)}"
