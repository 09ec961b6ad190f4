"""Import: image folders and tars of them into HDF5, in the layout that `hdf5` reads.

Two passes: one over names and headers, so that the order of rows, their size and mode are known
(and every mistake, before anything is written); one over pixels, straight into the file::

    train/b/1.png   train/a/2.png   train/a/1.png        as they come
    row 2           row 1           row 0                classes, then names, in alphabetical order

Invariant: the same images give the same files, whatever the order in which they are met; a file
under its final name is complete.
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

from dtrain.data.dataset import SAMPLES_PER_READ, Array, Moments, moments
from dtrain.data.image_files import Header, PathParts, header, images, pixels
from dtrain.errors import ConfigError, DataError

GREY = {"1", "L", "LA"}


CHUNK_BYTES = 2**20


ROWS_PER_WRITE = 512


SPLITS = ("train", "test")


def import_images(source: Path, out: Path, split: str | None = None) -> list[Path]:
    """Write the images of class folders to HDF5 and return the files that were made.

    Parameters
    ----------
    source : Path
        A folder of class folders, or a tar of one; nothing is extracted to disk.
    out : Path
        The file to write. A source that holds `train` and `test` gives `OUT.h5` and
        `OUT-test.h5`.
    split : str, optional
        Take this sub-folder only, into `out`.

    Returns
    -------
    list of Path
        Written files: x uint8 (N, C, H, W), y int64, attributes classes, mean, std (of the
        training split, in both files; of the only one where there is one).

    Raises
    ------
    DtrainError
        With code 2: `out` exists or has no folder. With code 3: Pillow is missing; the source is
        no image folder or tar; an image is damaged, misplaced, or differs in size.
    """
    if find_spec("PIL") is None:
        raise DataError("todo.key", "importing images needs Pillow: pip install 'dtrain[images]'")
    _require_writable(out)
    headers = _read_headers(source)
    splits = _splits(headers, split, source)
    paths = [out, out.with_name(f"{out.stem}-test{out.suffix}")][: len(splits)]
    for path in paths:
        _require_writable(path)
    size, mode = _common_header({path: headers[path] for each in splits for path in each.rows})
    with _atomic_files(paths) as files:
        for file, each in zip(files, splits, strict=True):
            each.create_datasets(
                file, splits[0].classes, (1 if mode == "L" else 3, size[1], size[0])
            )
        _write_images(source, files, splits, mode)
        statistics = _moments(files[0]["x"])
        for file in files:
            file.attrs["mean"], file.attrs["std"] = statistics
    return paths


@final
@dataclass(frozen=True)
class ImportSplit:
    """Rows of one file: `rows` maps an image's whole path to its row, `labels` is per row."""

    rows: dict[PathParts, int]
    classes: tuple[str, ...]
    labels: tuple[int, ...]

    def create_datasets(
        self, file: h5py.File, classes: tuple[str, ...], shape: tuple[int, ...]
    ) -> None:
        """Create the data sets; chunks of about 1 MB, uncompressed, so that reading is fast."""
        number = len(self.rows)
        chunk = min(number, max(1, CHUNK_BYTES // int(np.prod(shape))))
        file.create_dataset("x", (number, *shape), np.uint8, chunks=(chunk, *shape))
        file["y"] = np.asarray(self.labels, np.int64)
        file.attrs["classes"] = list(classes)


def _read_headers(source: Path) -> dict[PathParts, Header]:
    """Read the headers of all images; refuse a name that occurs twice."""
    found: dict[PathParts, Header] = {}
    for parts, opener in images(source):
        where = _location(source, parts)
        if parts in found:
            raise DataError("todo.key", f"{where} occurs twice: which one counts?")
        found[parts] = header(opener, where)
        _show_progress("headers", len(found))
    if not found:
        raise DataError("todo.key", f"{source}: no images in it: expected <class>/<image>")
    return found


def _splits(headers: dict[PathParts, Header], split: str | None, source: Path) -> list[ImportSplit]:
    """Return one split, or the training and the test split."""
    paths = sorted(headers)
    depth = _outer_depth(paths, split)
    tops = sorted({path[depth] for path in paths})
    if split is not None:
        if split not in tops:
            raise DataError("todo.key", f"{source}: no folder '{split}': found {_shorten(tops)}")
        return [_make_split(paths, depth, split, source)]
    if set(SPLITS) <= set(tops):
        train, test = (_make_split(paths, depth, name, source) for name in SPLITS)
        return [train, _relabel(test, train.classes, source)]
    if all(len(path) == depth + 3 for path in paths):
        raise DataError(
            "todo.key",
            f"{source}: found {_shorten(tops)} with folders inside, but not both train and test: "
            f"choose one with --split NAME",
        )
    return [_make_split(paths, depth, None, source)]


def _outer_depth(paths: list[PathParts], split: str | None) -> int:
    """Return how many outer folders enclose everything, as in cifar/train/airplane/1.png."""
    depth = 0
    while (
        all(len(path) > depth + 2 for path in paths)
        and len({path[depth] for path in paths}) == 1
        and paths[0][depth] not in (*SPLITS, split)
    ):
        depth += 1
    return depth


def _make_split(paths: list[PathParts], depth: int, name: str | None, source: Path) -> ImportSplit:
    """Return the split below folder `name`, its classes and names in alphabetical order."""
    if name is not None:
        paths, depth = [path for path in paths if path[depth] == name], depth + 1
    for path in paths:
        if len(path) != depth + 2:
            raise DataError(
                "todo.key",
                f"{_location(source, path)}: expected <class>/<image>, found {'/'.join(path[depth:])}",
            )
    classes = sorted({path[depth] for path in paths})
    labels = {label: number for number, label in enumerate(classes)}
    return ImportSplit(
        {path: row for row, path in enumerate(paths)},
        tuple(classes),
        tuple(labels[path[depth]] for path in paths),
    )


def _relabel(test: ImportSplit, classes: tuple[str, ...], source: Path) -> ImportSplit:
    """Number the test split's labels as the training split does."""
    strange = [each for each in test.classes if each not in classes]
    if strange:
        raise DataError(
            "todo.key",
            f"{source}: test has {_shorten(strange)}, which train lacks: it has "
            f"{_shorten(list(classes))}",
        )
    numbers = [classes.index(each) for each in test.classes]
    return ImportSplit(test.rows, classes, tuple(numbers[label] for label in test.labels))


def _common_header(headers: dict[PathParts, Header]) -> Header:
    """Return the size of all images and the mode to convert them to."""
    first = next(iter(headers))
    size = headers[first][0]
    for path, (other, _) in headers.items():
        if other != size:
            raise DataError(
                "todo.key",
                f"{'/'.join(path)} is {other[0]}x{other[1]} and {'/'.join(first)} is "
                f"{size[0]}x{size[1]}: make all images the same size",
            )
    return size, "L" if {mode for _, mode in headers.values()} <= GREY else "RGB"


def _write_images(
    source: Path, files: list[h5py.File], splits: list[ImportSplit], mode: str
) -> None:
    """Decode every image into its row; neighbours that come in order are written together."""
    total, done = sum(len(each.rows) for each in splits), 0
    writers = [RowWriter(file["x"]) for file in files]
    for parts, opener in images(source):
        for split, writer in zip(splits, writers, strict=True):
            if parts in split.rows:
                writer.put(split.rows[parts], pixels(opener, mode, _location(source, parts)))
                done += 1
                _show_progress("images", done, total)
    for writer in writers:
        writer.flush()
    assert done == total, "the source changed while it was read"


@final
class RowWriter:
    """Rows on their way to a data set, held back while each follows the one before."""

    def __init__(self, target: h5py.Dataset) -> None:
        self._target, self._start = target, 0
        self._pending_rows: list[Array] = []

    def put(self, row: int, value: Array) -> None:
        """Write one row, now or later."""
        if (
            row != self._start + len(self._pending_rows)
            or len(self._pending_rows) == ROWS_PER_WRITE
        ):
            self.flush()
            self._start = row
        self._pending_rows.append(value)

    def flush(self) -> None:
        """Write what is held."""
        if self._pending_rows:
            self._target[self._start : self._start + len(self._pending_rows)] = np.stack(
                self._pending_rows
            )
            self._pending_rows = []


def _moments(rows: h5py.Dataset) -> Moments:
    return moments(
        rows[start : start + SAMPLES_PER_READ] for start in range(0, len(rows), SAMPLES_PER_READ)
    )


@contextmanager
def _atomic_files(paths: list[Path]) -> Iterator[list[h5py.File]]:
    """Open files under temporary names, which become `paths` only when all are complete."""
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
            "todo.key", f"{path} exists and is never overwritten: delete it, or choose another name"
        )
    if not path.parent.is_dir():
        raise ConfigError("todo.key", f"{path}: there is no folder {path.parent}: create it first")


def _location(source: Path, parts: PathParts) -> str:
    return f"{source}: {'/'.join(parts)}"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")


def _show_progress(label: str, count: int, total: int | None = None) -> None:
    """Show how far it is, on a terminal only."""
    if sys.stderr.isatty() and (count % 1000 == 0 or count == total):
        of = f" of {total:,}" if total else ""
        end = "\n" if count == total else ""
        print(f"\r{label}: {count:,}{of}", end=end, file=sys.stderr, flush=True)
