"""Tables of comma-separated values: their columns, and fast reading of numbers.

The first line is a header if a field of it is no number where the second line has one. Numbers are
read by numpy, line by line; a table that it refuses is read again, for the place of the mistake.
"""

from __future__ import annotations

import csv
import gzip
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dtrain.data.array_names import closest
from dtrain.data.conversion import Array
from dtrain.errors import ConfigError, DataError

DELIMITERS = ",;\t|"


QUOTE = '"'


MOST_LISTED = 8


@dataclass(frozen=True)
class Layout:
    """The columns of a file.

    Attributes
    ----------
    header : tuple of str
        Names of the columns, () without a header.
    count : int
        Number of columns.
    first_row : tuple of str
        The fields of the first line of data.
    """

    path: Path
    delimiter: str
    header: tuple[str, ...]
    count: int
    first_row: tuple[str, ...]

    def position(self, column: str | int, key: str) -> int:
        """Return the number of a column from 0, given as its name or as a number.

        Raises
        ------
        ConfigError
            There is no such column, or several of that name.
        """
        if isinstance(column, int):
            if not -self.count <= column < self.count:
                raise ConfigError(
                    "data.no-column",
                    f"[data] {key} = {column}: {self.path} has the columns 0 to {self.count - 1}",
                )
            return column % self.count
        if self.header.count(column) == 1:
            return self.header.index(column)
        names = ", ".join(self.header[:MOST_LISTED]) or "no header"
        more = ", ..." if len(self.header) > MOST_LISTED else ""
        near = closest(column, self.header)
        hint = f"; did you mean '{near}'?" if near is not None and near != column else ""
        raise ConfigError(
            "data.no-column",
            f'[data] {key} = "{column}": {self.path} has {self.header.count(column)} columns of '
            f"that name ({names}{more}){hint}",
        )

    def column_name(self, position: int) -> str:
        """Return what messages call a column."""
        return f"'{self.header[position]}'" if self.header else str(position)


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read, by their numbers."""

    features: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """The numbers of a file.

    Attributes
    ----------
    features, targets : array
        (n, columns), float64.
    texts : tuple of str
        The distinct texts of the only target, where it is no number: `targets` are their numbers.
    """

    path: Path
    features: Array
    targets: Array
    texts: tuple[str, ...]


def read_layout(path: Path, delimiter: str | None, named: Sequence[str | int] = ()) -> Layout:
    """Return the columns of a file; columns that are `named` by a text are those of a header.

    Raises
    ------
    DataError
        The file is missing, empty or no text.
    """
    with opened(path) as file:
        start = file.readline()
        delimiter = delimiter or max(DELIMITERS, key=start.count)
        file.seek(0)
        rows = list(islice(filter(None, csv_rows(file, delimiter)), 2))
    if not rows:
        raise DataError("data.csv-empty", f"{path} is empty: write one line per sample")
    first, second = rows[0], rows[-1]
    numbers = zip(first, second, strict=False)
    has_header = any(not is_number(a) and is_number(b) for a, b in numbers)
    has_header |= len(rows) == 1 and not any(map(is_number, first))
    has_header |= any(isinstance(name, str) and name in first for name in named)
    header = tuple(name.strip() for name in first) if has_header else ()
    sample = rows[-1] if has_header else first
    return Layout(path, delimiter, header, len(first), tuple(sample))


def read_table(layout: Layout, columns: Columns, *, has_texts: bool) -> Table:
    """Read columns of a file.

    Parameters
    ----------
    has_texts : bool
        Whether the only target is a text.

    Raises
    ------
    DataError
        It names line and column of a field that is missing or no number.
    """
    numbers: dict[str, int] = {}
    wanted = (*columns.features, *columns.targets)
    all_columns = sorted(wanted) == list(range(layout.count))
    converters: Any = {columns.targets[0]: _numbering(numbers)} if has_texts else None
    try:
        with opened(layout.path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty table
            cells = np.loadtxt(
                file,
                np.float64,
                comments=None,
                delimiter=layout.delimiter,
                converters=converters,
                skiprows=1 if layout.header else 0,
                usecols=None if all_columns else wanted,
                quotechar=QUOTE,
                ndmin=2,
                encoding=None,
            )
    except ValueError as error:
        _locate(layout, columns, has_texts)
        raise DataError("data.csv-damaged", f"{layout.path} is no table: {error}") from error
    if not cells.size:
        cells = np.empty((0, len(wanted)))
    places = wanted if all_columns else tuple(range(len(wanted)))
    split = len(columns.features)
    features, targets = (_columns(cells, part) for part in (places[:split], places[split:]))
    return Table(layout.path, features, targets, tuple(numbers))


def is_number(text: str) -> bool:
    """Return whether a field is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # Python alone reads 1_000


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """Open a text file, which may be compressed by gzip.

    Raises
    ------
    DataError
        The file is missing, or no text.
    """
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig", newline="")
        ) as file:
            yield file
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        if not path.is_file():
            raise DataError(
                "data.file-missing", f"{path} does not exist: correct the path"
            ) from error
        raise DataError(
            "data.file-damaged", f"{path} cannot be read as text: {error}; copy it again"
        ) from error


def csv_rows(file: TextIO, delimiter: str) -> Any:
    return csv.reader(file, delimiter=delimiter, quotechar=QUOTE)


def _numbering(numbers: dict[str, int]) -> Callable[[str], float]:
    """Return a function that numbers texts in the order of their first occurrence."""

    def number(text: str) -> float:
        stripped = text.strip()
        if not stripped:
            raise ValueError("an empty field")
        return numbers.setdefault(stripped, len(numbers))

    return number


def _columns(cells: Array, places: Sequence[int]) -> Array:
    """Return some columns, without a copy where they are neighbours."""
    if places and list(places) == list(range(places[0], places[-1] + 1)):
        return cells[:, places[0] : places[-1] + 1]
    return cells[:, list(places)]


def _locate(layout: Layout, columns: Columns, has_texts: bool) -> None:
    """Raise an error with the place of the first field that is wrong, if one is found."""
    with opened(layout.path) as file:
        rows = csv_rows(file, layout.delimiter)
        for row in islice(filter(None, rows), 1 if layout.header else 0, None):
            check_row(layout, columns, has_texts, row, rows.line_num)


def check_row(
    layout: Layout, columns: Columns, has_texts: bool, row: Sequence[str], line: int
) -> None:
    """Refuse a line that has a wrong number of fields, or a field that is missing or no number.

    Raises
    ------
    DataError
        It names the place.
    """
    place = f"{layout.path}, line {line}"
    if len(row) != layout.count:
        raise DataError(
            "data.csv-columns",
            f"{place} has {len(row)} fields, the first line {layout.count}: correct the line, or "
            "set [data] delimiter",
        )
    for position in (*columns.features, *columns.targets):
        is_text = has_texts and position in columns.targets
        text = row[position].strip()
        if not text or not (is_text or is_number(text)):
            described = f"is '{text}', no number" if text else "is empty"
            raise DataError(
                "data.csv-field",
                f"{place}, column {layout.column_name(position)} {described}: correct it, "
                "remove the line, or leave the column out of [data] features",
            )
