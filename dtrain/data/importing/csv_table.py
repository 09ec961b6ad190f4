"""Tables as text: one sample a line, numbers in all columns but that of the target.

The first line is a header if a cell of it is no number where the second line has one. Targets are
labels where all are whole numbers, real numbers where one has a fraction, and names of classes
where none is a number.

Invariant: the table is read line by line: once to check it, then once for the samples and once for
the targets.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.hdf5_pieces import rows_per_piece
from dtrain.data.importing.array_stream import (
    ArrayStream,
    StreamedSplit,
    named_labels,
    refuse_many_names,
    shorten,
)
from dtrain.errors import DataError

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


LARGEST_INTEGER = 2**24
"""Whole numbers up to this one are exact in float32, as which integers are trained on."""


READ_ERRORS = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)


NumberedRow = tuple[int, list[str]]
"""Number of the line, from 1, and the cells."""


def is_csv(source: Path) -> bool:
    """Return whether a file is a table, by its name."""
    return source.is_file() and source.name.lower().endswith(SUFFIXES)


def open_csv(source: Path, target: str | None) -> list[StreamedSplit]:
    """Return the only split of a table.

    Parameters
    ----------
    target : str, optional
        The column of the targets: its name, or its number from 0; -1 is the last. Default: the
        last.

    Raises
    ------
    DataError
        A cell is no number, lines have different numbers of cells, or there is no such column.
    """
    table = _read_layout(source, target)
    scan = _scan(table)
    x_shape = (scan.rows, table.columns - 1)
    x_dtype = np.dtype(np.int64 if scan.has_integers else np.float64)
    y_dtype = np.dtype(np.float64 if scan.has_fractions else np.int64)
    location = f"{source}: column {table.describe(table.target)}"
    if scan.names:
        y_dtype = np.dtype(f"U{max(map(len, scan.names))}")
    split = StreamedSplit(
        "train",
        ArrayStream(str(source), x_shape, x_dtype, lambda: _features(table, x_shape, x_dtype)),
        ArrayStream(location, (scan.rows,), y_dtype, lambda: _targets(table, y_dtype)),
    )
    return [named_labels(split, tuple(sorted(scan.names))) if scan.names else split]


@final
@dataclass(frozen=True)
class _Table:
    """The layout of a table.

    Attributes
    ----------
    header : list of str
        Names of the columns; empty without a header.
    target : int
        Number of the target's column, from 0.
    """

    source: Path
    delimiter: str
    header: list[str]
    columns: int
    target: int

    def describe(self, column: int) -> str:
        """Return a column's number, and its name."""
        return f"{column} '{self.header[column]}'" if self.header else f"{column}"

    def rows(self) -> Iterator[NumberedRow]:
        """Yield the lines after the header.

        Raises
        ------
        DataError
            A line has another number of cells.
        """
        with _open_rows(self.source, self.delimiter) as rows:
            for line, cells in islice(rows, 1 if self.header else 0, None):
                if len(cells) != self.columns:
                    raise DataError(
                        "import.csv-columns",
                        f"{self.source}, line {line} has {len(cells)} cells and the first line "
                        f"{self.columns}: correct the line",
                    )
                yield line, cells

    def features(self, line: int, cells: list[str]) -> list[float]:
        """Return the numbers of a line, without the target."""
        values = cells[: self.target] + cells[self.target + 1 :]
        try:
            return list(map(float, values))
        except ValueError:
            number = next(i for i, cell in enumerate(values) if _number(cell) is None)
            column = number + (number >= self.target)
            raise DataError(
                "import.csv-no-number",
                f"{self.source}, line {line}, column {self.describe(column)}: "
                f"'{cells[column]}' is no number: write numbers in all columns but the target's",
            ) from None


@final
@dataclass
class _Scan:
    """The facts of a table that all lines decide."""

    rows: int = 0
    has_integers: bool = True
    has_numbers: bool = False
    has_fractions: bool = False
    names: set[str] = field(default_factory=set)


def _read_layout(source: Path, target: str | None) -> _Table:
    """Find delimiter, header and the target's column by the first two lines."""
    with _open_text(source) as file:
        first_line = file.readline()
    delimiter = max(",;\t|", key=first_line.count)
    with _open_rows(source, delimiter) as rows:
        first, second = ([cells for _, cells in islice(rows, 2)] + [[], []])[:2]
    if not first:
        raise DataError("import.csv-empty", f"{source} has no samples: add lines of numbers")
    if len(first) < 2:
        raise DataError(
            "import.csv-one-column",
            f"{source} has {len(first)} columns in its first line: separate at least one number "
            "and the target by commas, semicolons or tabs",
        )
    pairs = zip(first, second, strict=False)
    has_header = any(_number(a) is None and _number(b) is not None for a, b in pairs)
    if has_header and not all(first):
        raise DataError(
            "import.csv-unnamed-column",
            f"{source}: column {first.index('')} has no name, as pandas writes the numbers of the "
            "rows: leave it out (index=False), or name it",
        )
    header = first if has_header else []
    column = _find_target(source, header, len(first), target)
    return _Table(source, delimiter, header, len(first), column)


def _find_target(source: Path, header: list[str], columns: int, target: str | None) -> int:
    """Return the number of the target's column."""
    if target is None:
        return columns - 1
    if target in header:
        return header.index(target)
    try:
        return range(columns)[int(target)]
    except (ValueError, IndexError):
        names = f"choose one of {shorten(header)}, or" if header else "without a header choose"
        raise DataError(
            "import.csv-target",
            f"{source} has no column '{target}': {names} a number from 0 to {columns - 1}",
        ) from None


def _scan(table: _Table) -> _Scan:
    """Check all lines."""
    scan = _Scan()
    location = f"{table.source}: column {table.describe(table.target)}"
    for line, cells in table.rows():
        scan.rows += 1
        values = table.features(line, cells)
        if scan.has_integers:
            scan.has_integers = all(map(_is_integer, values))
        number = _number(cells[table.target])
        if number is None:
            scan.names.add(cells[table.target])
            refuse_many_names(scan.names, location)
        else:
            scan.has_numbers = True
            scan.has_fractions |= not _is_integer(number)
        if scan.names and scan.has_numbers:
            raise DataError(
                "import.csv-target-mixed",
                f"{table.source}, line {line}: the target '{cells[table.target]}' is a number and "
                "others are not, or the reverse: write numbers or names in all lines",
            )
    return scan


def _features(table: _Table, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
    rows = table.rows()
    # Cells of Python take some eight times the memory of numbers.
    step = rows_per_piece((shape[0], 8 * shape[1]), dtype)
    while piece := [table.features(line, cells) for line, cells in islice(rows, step)]:
        yield np.array(piece, np.float64).astype(dtype)


def _targets(table: _Table, dtype: np.dtype[Any]) -> Iterator[Array]:
    rows = table.rows()
    while piece := [cells[table.target] for _, cells in islice(rows, 2**14)]:
        yield np.array(piece, dtype) if dtype.kind == "U" else np.array(piece, float).astype(dtype)


@contextmanager
def _open_rows(source: Path, delimiter: str) -> Iterator[Iterator[NumberedRow]]:
    """Open a table; yield its lines but the empty ones."""
    with _open_text(source) as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        yield ((reader.line_num, cells) for cells in reader if cells)


@contextmanager
def _open_text(source: Path) -> Iterator[Any]:
    opener = gzip.open if source.name.endswith(".gz") else open
    try:
        with opener(source, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except READ_ERRORS as error:
        raise DataError(
            "import.file-damaged",
            f"{source} cannot be read as a table of text: {error}; make or copy it again",
        ) from error


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _is_integer(number: float) -> bool:
    return number.is_integer() and abs(number) <= LARGEST_INTEGER
