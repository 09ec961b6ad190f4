"""Import image folders and tars of them into HDF5 files of the layout that `hdf5` reads.

Two passes. The first reads names and headers, which give the order of rows, their size and mode,
so that mistakes are reported before anything is written. The second writes pixels into the file::

    train/b/1.png   train/a/2.png   train/a/1.png        in the source's order
    row 2           row 1           row 0                classes, then names, in alphabetical order

Invariant: the same images give the same files, whatever the source's order; a file under its final
name is complete.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import final

import h5py
import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.image_files import Header, PathParts, iter_images, read_header, read_pixels
from dtrain.data.statistics import StoredRows, compute_statistics
from dtrain.errors import ConfigError, DataError

GREY_MODES = {"1", "L", "LA"}


CHUNK_BYTES = 2**20
"""Size of a chunk of `x` in the file."""


ROWS_PER_WRITE = 512


SPLITS = ("train", "test")


def import_images(source: Path, out: Path, split: str | None = None) -> list[Path]:
    """Write the images of class folders to HDF5 files and return the files' paths.

    Parameters
    ----------
    source : Path
        A folder of class folders, or a tar of one; nothing is extracted to disk.
    out : Path
        The file to write. A source with folders `train` and `test` gives `OUT.h5` and
        `OUT-test.h5`.
    split : str, optional
        Import only this sub-folder, into `out`.

    Returns
    -------
    list of Path
        Written files: x uint8 (N, C, H, W), y int64 (N,), and attributes classes, mean and std.
        Both files have the training split's mean and std; a single file has its own.

    Raises
    ------
    ConfigError
        `out` exists, or its folder does not.
    DataError
        Pillow is missing; the source is no image folder or tar; an image is damaged, misplaced or
        of another size.
    """
    if find_spec("PIL") is None:
        raise DataError(
            "import.pillow-missing", "importing images needs Pillow: pip install 'dtrain[images]'"
        )
    _require_writable(out)
    headers = _read_headers(source)
    splits = _splits(headers, split, source)
    paths = [out, out.with_name(f"{out.stem}-test{out.suffix}")][: len(splits)]
    for path in paths:
        _require_writable(path)
    used = {path: headers[path] for import_split in splits for path in import_split.rows}
    (width, height), mode = _common_header(used)
    shape = 1 if mode == "L" else 3, height, width
    with _atomic_files(paths) as files:
        for file, import_split in zip(files, splits, strict=True):
            import_split.create_datasets(file, splits[0].classes, shape)
        _write_images(source, files, splits, mode)
        statistics = compute_statistics(StoredRows(files[0]["x"]), stored_units=True)
        for file in files:
            file.attrs["mean"], file.attrs["std"] = statistics.moments
    return paths


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

    def create_datasets(
        self, file: h5py.File, classes: tuple[str, ...], shape: tuple[int, ...]
    ) -> None:
        """Create `x`, for samples of `shape`, `y` and the attribute `classes` in a file.

        Chunks of about 1 MB without compression are fast to read.
        """
        count = len(self.rows)
        chunk = min(count, max(1, CHUNK_BYTES // int(np.prod(shape))))
        file.create_dataset("x", (count, *shape), np.uint8, chunks=(chunk, *shape))
        file["y"] = np.asarray(self.labels, np.int64)
        file.attrs["classes"] = list(classes)


def _read_headers(source: Path) -> dict[PathParts, Header]:
    """Read the headers of all images; refuse a path that occurs twice."""
    headers: dict[PathParts, Header] = {}
    for path, opener in iter_images(source):
        location = _location(source, path)
        if path in headers:
            raise DataError("import.image-twice", f"{location} occurs twice: remove one of them")
        headers[path] = read_header(opener, location)
        _show_progress("headers", len(headers))
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
                f"{source} has no folder '{split}': choose one of {_shorten(tops)}",
            )
        return [_make_split(paths, depth, split, source)]
    if set(SPLITS) <= set(tops):
        train, test = (_make_split(paths, depth, name, source) for name in SPLITS)
        return [train, _relabel(test, train.classes, source)]
    if all(len(path) == depth + 3 for path in paths):
        raise DataError(
            "import.split-ambiguous",
            f"{source}: found {_shorten(tops)} with folders inside, but not both train and test: "
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
            f"{source}: classes {_shorten(unknown)} of test are not in train, which has "
            f"{_shorten(list(classes))}: remove them from test or add them to train",
        )
    numbers = [classes.index(name) for name in test.classes]
    return ImportSplit(test.rows, classes, tuple(numbers[label] for label in test.labels))


def _common_header(headers: dict[PathParts, Header]) -> Header:
    """Return the images' common size and the mode to convert them to, "L" or "RGB"."""
    first = next(iter(headers))
    size = headers[first][0]
    for path, (other, _) in headers.items():
        if other != size:
            raise DataError(
                "import.sizes-differ",
                f"{'/'.join(path)} is {other[0]}x{other[1]} and {'/'.join(first)} is "
                f"{size[0]}x{size[1]}: make all images the same size",
            )
    return size, "L" if {mode for _, mode in headers.values()} <= GREY_MODES else "RGB"


def _write_images(
    source: Path, files: list[h5py.File], splits: list[ImportSplit], mode: str
) -> None:
    """Decode every image into its row."""
    total, done = sum(len(split.rows) for split in splits), 0
    writers = [RowWriter(file["x"]) for file in files]
    for path, opener in iter_images(source):
        for split, writer in zip(splits, writers, strict=True):
            if path in split.rows:
                writer.put(split.rows[path], read_pixels(opener, mode, _location(source, path)))
                done += 1
                _show_progress("images", done, total)
    for writer in writers:
        writer.flush()
    assert done == total, "the source changed while it was read"


@final
class RowWriter:
    """Writes rows to an HDF5 dataset, consecutive rows together."""

    def __init__(self, target: h5py.Dataset) -> None:
        self._target = target
        self._start = 0
        self._pending_rows: list[Array] = []

    def put(self, row: int, value: Array) -> None:
        """Queue one row; write the queue first where the row does not follow or it is full."""
        pending = len(self._pending_rows)
        if row != self._start + pending or pending == ROWS_PER_WRITE:
            self.flush()
            self._start = row
        self._pending_rows.append(value)

    def flush(self) -> None:
        """Write the queued rows."""
        if self._pending_rows:
            rows = np.stack(self._pending_rows)
            self._target[self._start : self._start + len(rows)] = rows
            self._pending_rows = []


@contextmanager
def _atomic_files(paths: list[Path]) -> Iterator[list[h5py.File]]:
    """Open files under temporary names; rename them to `paths` when all are complete."""
    drafts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(h5py.File(draft, "w", locking=False)) for draft in drafts]
        for draft, path in zip(drafts, paths, strict=True):
            draft.rename(path)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def _require_writable(path: Path) -> None:
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


def _location(source: Path, path: PathParts) -> str:
    return f"{source}: {'/'.join(path)}"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")


def _show_progress(label: str, count: int, total: int | None = None) -> None:
    """Print the progress, on a terminal only."""
    if sys.stderr.isatty() and (count % 1000 == 0 or count == total):
        of = f" of {total:,}" if total else ""
        end = "\n" if count == total else ""
        print(f"\r{label}: {count:,}{of}", end=end, file=sys.stderr, flush=True)
