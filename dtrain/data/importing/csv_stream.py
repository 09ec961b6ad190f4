"""Tables as text: one sample a line, numbers in all columns but that of the target.

Columns, header and targets are found as `[data] name = "csv"` finds them; here the table is read
line by line, so it may be larger than memory: once to check it, then once for the samples and once
for the targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.csv_set import LARGEST_INTEGER
from dtrain.data.csv_table import (
    Columns,
    Layout,
    check_row,
    csv_rows,
    is_number,
    opened,
    read_layout,
)
from dtrain.data.hdf5_pieces import rows_per_piece
from dtrain.data.importing.array_stream import (
    ArrayStream,
    StreamedSplit,
    named_labels,
    refuse_many_names,
)
from dtrain.errors import DataError

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


TARGETS_PER_READ = 2**14


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
    ConfigError
        There is no such column.
    DataError
        A field is missing or no number.
    """
    table = _open_table(source, target)
    scan = _scan(table)
    x_shape = (scan.rows, table.layout.count - 1)
    x_dtype = np.dtype(np.int64 if scan.has_integers else np.float64)
    y_shape = (scan.rows, 1) if scan.has_fractions else (scan.rows,)
    y_dtype = np.dtype(np.float64 if scan.has_fractions else np.int64)
    if scan.names:
        y_dtype = np.dtype(f"U{max(map(len, scan.names))}")
    split = StreamedSplit(
        "train",
        ArrayStream(str(source), x_shape, x_dtype, lambda: _features(table, x_shape, x_dtype)),
        ArrayStream(table.location, y_shape, y_dtype, lambda: _targets(table, y_shape, y_dtype)),
    )
    return [named_labels(split, tuple(sorted(scan.names))) if scan.names else split]


@final
@dataclass(frozen=True)
class _Table:
    """The columns of a table, and whether its target is a text."""

    layout: Layout
    target: int
    has_texts: bool

    @property
    def location(self) -> str:
        """The column of the targets, for messages."""
        return f"{self.layout.path}: column {self.layout.column_name(self.target)}"

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield number and fields of the lines after the header."""
        with opened(self.layout.path) as file:
            reader = csv_rows(file, self.layout.delimiter)
            for row in islice(filter(None, reader), 1 if self.layout.header else 0, None):
                yield reader.line_num, row

    def features(self, row: list[str]) -> list[float]:
        """Return the numbers of a line, without the target."""
        return list(map(float, row[: self.target] + row[self.target + 1 :]))


@final
@dataclass
class _Scan:
    """The facts of a table that all lines decide."""

    rows: int = 0
    has_integers: bool = True
    has_fractions: bool = False
    names: set[str] = field(default_factory=set)


def _open_table(source: Path, target: str | None) -> _Table:
    """Find the columns of a table by its first lines."""
    name = "-1" if target is None else target
    layout = read_layout(source, None, () if is_number(name) else (name,))
    if layout.count < 2:
        raise DataError(
            "import.csv-one-column",
            f"{source} has one column: separate at least one number and the target by commas, "
            "semicolons or tabs",
        )
    if "" in layout.header:
        raise DataError(
            "import.csv-unnamed-column",
            f"{source}: column {layout.header.index('')} has no name, as pandas writes the numbers "
            "of the rows: leave it out (index=False), or name it",
        )
    is_position = name not in layout.header and name.removeprefix("-").isdecimal()
    position = layout.position(int(name) if is_position else name, "target")
    return _Table(layout, position, not is_number(layout.first_row[position].strip()))


def _scan(table: _Table) -> _Scan:
    """Check all lines."""
    scan = _Scan()
    others = tuple(i for i in range(table.layout.count) if i != table.target)
    columns = Columns(others, (table.target,))
    for line, row in table.rows():
        check_row(table.layout, columns, table.has_texts, row, line)
        scan.rows += 1
        if scan.has_integers:
            scan.has_integers = all(map(_is_integer, table.features(row)))
        if table.has_texts:
            scan.names.add(row[table.target].strip())
            refuse_many_names(scan.names, table.location)
        elif not scan.has_fractions:
            scan.has_fractions = not _is_integer(float(row[table.target]))
    return scan


def _features(table: _Table, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
    rows = table.rows()
    # Fields of Python take some eight times the memory of numbers.
    step = rows_per_piece((shape[0], 8 * shape[1]), dtype)
    while piece := [table.features(row) for _, row in islice(rows, step)]:
        yield np.array(piece, np.float64).astype(dtype)


def _targets(table: _Table, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
    rows = table.rows()
    while piece := [row[table.target].strip() for _, row in islice(rows, TARGETS_PER_READ)]:
        values = np.array(piece, dtype if dtype.kind == "U" else np.float64)
        yield values.astype(dtype).reshape(-1, *shape[1:])


def _is_integer(number: float) -> bool:
    return number.is_integer() and abs(number) <= LARGEST_INTEGER
