"""Import data of other formats into HDF5 files of the layout that `hdf5` reads.

Invariant: a source is read piece by piece, nothing in it is extracted to disk, and a file under its
final name is complete. The same source gives the same files. Nothing is unpickled, except the files
of Planetoid, by an unpickler that is restricted to arrays and lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import h5py

from dtrain.data.formats.hdf5_writer import (
    add_statistics,
    atomic_files,
    create_rows,
    require_writable,
    write_pieces,
)
from dtrain.data.formats.text_set import Tokens
from dtrain.data.importing.array_stream import StreamedSplit, check_split, shorten
from dtrain.data.importing.csv_stream import is_csv, open_csv
from dtrain.data.importing.idx_stream import is_idx, open_idx_folder, open_idx_split, stream_idx
from dtrain.data.importing.image_files import Fit
from dtrain.data.importing.image_set import open_images
from dtrain.data.importing.numpy_stream import open_npz, stream_npy
from dtrain.data.importing.planetoid_files import PlanetoidFiles, is_planetoid
from dtrain.data.importing.text_stream import TextFile, is_text
from dtrain.errors import ConfigError, DataError

NPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"


class _Source(Protocol):
    """Splits that can be written to files."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the splits, one for each file."""

    def write(self, files: list[h5py.File]) -> None:
        """Write samples, targets and names of classes."""


@final
@dataclass(frozen=True)
class ImportOptions:
    """What to take of a source, and how.

    Attributes
    ----------
    split : str, optional
        Import only this split.
    size, fit : optional
        Of images: (height, width), and "resize" (the default) or "crop".
    x, y : str, optional
        Names of the arrays in a `.npz` file; `y` is the file of the targets for `.npy` and IDX.
    target : str, optional
        Column of the targets in a table: its name, or its number from 0.
    tokens : "bytes" or "characters", optional
        The tokens of a text, by default bytes.
    """

    split: str | None = None
    size: tuple[int, int] | None = None
    fit: Fit | None = None
    x: str | None = None
    y: str | None = None
    target: str | None = None
    tokens: Tokens | None = None

    def refuse(self, kind: str, *names: str) -> None:
        """Refuse options that a source of this kind does not take."""
        for name in names:
            if getattr(self, name) is not None:
                raise ConfigError(
                    "import.option-unused",
                    f"--{name}: the source is {kind}, which does not take it: leave it out",
                )


NO_OPTIONS = ImportOptions()


def import_data(source: Path, out: Path, options: ImportOptions = NO_OPTIONS) -> list[Path]:
    """Write a data set to HDF5 files and return the files' paths.

    Parameters
    ----------
    source : Path
        A folder of class folders or a tar of one; `.npz`, `.npy`, `.csv` or IDX; a folder with the
        IDX files of MNIST; a text, `.txt`; or a folder with the files of a Planetoid graph, or one
        of these.
    out : Path
        The file to write. A source with a training and a test split gives `OUT.h5` and
        `OUT-test.h5`.

    Returns
    -------
    list of Path
        Written files: x (N, ...), y (N, ...), and attributes mean and std of the training split;
        classes where they have names. Of a text: tokens (n,) and classes. Of a graph: x, y, edges
        (E, 2), and the nodes of each split.

    Raises
    ------
    ConfigError
        A file exists, or an option does not fit the format.
    DataError
        The source is missing, damaged, or not of one of the formats.
    """
    require_writable(out)
    opened = _open(source, options)
    paths = [out]
    for name in opened.names[1:]:
        paths.append(out.with_name(f"{out.stem}-{name}{out.suffix}"))
        require_writable(paths[-1])
    with atomic_files(paths) as files:
        opened.write(files)
        if not isinstance(opened, TextFile | PlanetoidFiles):  # nodes are scaled one by one
            add_statistics(files)
    return paths


def open_arrays(source: Path, options: ImportOptions = NO_OPTIONS) -> list[StreamedSplit] | None:
    """Return the splits of a source that is not made of images, else None.

    Raises
    ------
    DataError
        The source is damaged.
    """
    if is_csv(source):
        options.refuse("a table", "x", "y")
        return open_csv(source, options.target)
    if is_idx(source):
        options.refuse("of IDX files", "x", "target")
        if source.is_dir():
            options.refuse("a folder of IDX files", "y")
            return open_idx_folder(source)
        return open_idx_split(source, None if options.y is None else Path(options.y))
    if source.is_dir():
        return None
    with source.open("rb") as file:
        magic = file.read(len(NPY_MAGIC))
    if magic == NPY_MAGIC:
        options.refuse("one array", "x", "target")
        return [_open_npy_split(source, options.y)]
    if source.suffix == ".npz" or magic.startswith(ZIP_MAGIC):
        options.refuse("a file of arrays", "target")
        return open_npz(source, options.x, options.y)
    return None


@final
class ArraySet:
    """Splits of arrays that are read in pieces, the first of which decides the classes."""

    def __init__(self, splits: list[StreamedSplit]) -> None:
        first = check_split(splits[0])
        self._splits = [first, *(check_split(split, first.classes) for split in splits[1:])]
        self.names = tuple(split.name for split in splits)

    def write(self, files: list[h5py.File]) -> None:
        """Write samples, targets and names of classes."""
        for file, split in zip(files, self._splits, strict=True):
            for name, array in (("x", split.x), ("y", split.y)):
                rows = create_rows(file, name, array.shape, array.dtype)
                write_pieces(rows, array.pieces(), name)
            if split.classes:
                file.attrs["classes"] = list(split.classes)


def _open(source: Path, options: ImportOptions) -> _Source:
    """Open a source by its format."""
    if options.fit is not None and options.size is None:
        raise ConfigError(
            "import.fit-without-size",
            f"--fit {options.fit} needs a size: give --size HEIGHTxWIDTH",
        )
    if is_text(source):
        options.refuse("a text", "split", "size", "x", "y", "target")
        return TextFile(source, options.tokens or "bytes")
    options.refuse("no text", "tokens")
    if is_planetoid(source):
        options.refuse("a Planetoid graph", "split", "size", "x", "y", "target")
        return PlanetoidFiles(source)
    arrays = open_arrays(source, options) if source.exists() else None
    if arrays is not None:
        options.refuse("no set of images", "size")
        return ArraySet(_choose_split(arrays, options.split, source))
    if source.exists():
        options.refuse("a set of images", "x", "y", "target")
    return open_images(source, options.split, options.size, options.fit or "resize")


def _open_npy_split(source: Path, y: str | None) -> StreamedSplit:
    if y is None:
        raise DataError(
            "import.targets-missing", f"{source} has one array: name the targets by --y FILE.npy"
        )
    targets = stream_idx(Path(y)) if is_idx(Path(y)) else stream_npy(Path(y))
    return StreamedSplit("train", stream_npy(source), targets)


def _choose_split(
    splits: list[StreamedSplit], name: str | None, source: Path
) -> list[StreamedSplit]:
    """Return all splits, or the one of a name."""
    chosen = [split for split in splits if name in (None, split.name)]
    if not chosen:
        names = [split.name for split in splits]
        raise DataError(
            "import.split-missing",
            f"{source} has no split '{name}': choose one of {shorten(names)}",
        )
    return chosen
