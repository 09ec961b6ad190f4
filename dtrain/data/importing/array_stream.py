"""Arrays of other file formats, whose rows are read in order, piece by piece.

Invariant: one piece is in memory at a time, so an array may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any, final

import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.hdf5_pieces import rows_per_piece
from dtrain.data.npy_source import Header, check_npy_header
from dtrain.data.source_dataset import check_arrays
from dtrain.errors import DataError

MAX_CLASSES = 100_000
"""Names of more classes are no names of classes."""


@final
@dataclass(frozen=True)
class ArrayStream:
    """One array of a source.

    Attributes
    ----------
    location : str
        File and name, for messages.
    shape, dtype
        Of the whole array, samples first.
    pieces : callable
        Starts to read; returns the rows in order, in pieces.
    """

    location: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: Callable[[], Iterator[Array]]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def map(self, function: Callable[[Array], Array], dtype: np.dtype[Any]) -> ArrayStream:
        """Return the stream with a function applied to each piece, which keeps the shape."""
        return replace(self, dtype=dtype, pieces=lambda: (function(p) for p in self.pieces()))


@final
@dataclass(frozen=True)
class StreamedSplit:
    """Samples and targets of one split.

    Attributes
    ----------
    name : str
        "train", "test" or "validation".
    classes : tuple of str
        Names of the classes; () where labels have none.
    """

    name: str
    x: ArrayStream
    y: ArrayStream
    classes: tuple[str, ...] = ()


def check_split(split: StreamedSplit, classes: tuple[str, ...] = ()) -> StreamedSplit:
    """Return a split whose arrays can be trained on; names of classes become labels.

    Parameters
    ----------
    classes : tuple of str
        The names of the training split's classes; () where this is the training split.

    Raises
    ------
    DataError
        Shapes, lengths or dtypes are illegal, or a class is not in `classes`.
    """
    for array in (split.x, split.y):
        check_npy_header(Header(array.shape, False, array.dtype), array.location)
    check_arrays(split.x, split.y, split.x.location)
    if split.y.dtype.kind not in "US":
        return split
    return named_labels(split, classes or find_names(split.y))


def named_labels(split: StreamedSplit, classes: tuple[str, ...]) -> StreamedSplit:
    """Return a split whose targets, names of classes, are replaced by the classes' numbers."""
    numbers = {name: number for number, name in enumerate(classes)}

    def number(names: Array) -> Array:
        try:
            return np.array([numbers[name_text(name)] for name in names], np.int64)
        except KeyError as error:
            raise DataError(
                "import.class-unknown",
                f"{split.y.location}: class {error} is not in the training split, which has "
                f"{shorten(classes)}: remove it, or add it to the training split",
            ) from None

    labels = split.y.map(number, np.dtype(np.int64))
    return replace(split, y=labels, classes=classes)


def find_names(y: ArrayStream) -> tuple[str, ...]:
    """Return the distinct names in an array of strings, in alphabetical order."""
    if y.ndim != 1:
        raise DataError(
            "import.names-shape",
            f"{y.location}: names of classes have shape {y.shape}: give one per sample",
        )
    names: set[str] = set()
    for piece in y.pieces():
        names.update(map(name_text, np.unique(piece)))
        refuse_many_names(names, y.location)
    return tuple(sorted(names))


def refuse_many_names(names: set[str], location: str) -> None:
    """Refuse more names than a data set has classes."""
    if len(names) > MAX_CLASSES:
        raise DataError(
            "import.too-many-classes",
            f"{location} has more than {MAX_CLASSES:,} different names: these are no classes; "
            "choose other targets",
        )


def read_raw(
    file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], location: str
) -> Iterator[Array]:
    """Yield the rows of an array whose bytes follow in a file, in C order."""
    step = rows_per_piece(shape, dtype)
    row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
    for start in range(0, shape[0], step):
        count = min(step, shape[0] - start)
        content = file.read(count * row_bytes)
        if len(content) < count * row_bytes:
            raise DataError(
                "data.file-damaged",
                f"{location} ends after {start + len(content) // max(1, row_bytes)} of "
                f"{shape[0]} samples: make or copy the file again",
            )
        piece = np.frombuffer(content, dtype).reshape(count, *shape[1:])
        yield piece.astype(dtype.newbyteorder("="), copy=False)


def shorten(names: tuple[str, ...] | list[str]) -> str:
    """Return the first names, and their number where there are more."""
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")


def name_text(name: str | bytes) -> str:
    """Return a name as text."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
