"""CSV files in the run folder, one per kind of record: `csv/train.csv`, `csv/eval.csv`, ...

Invariant: every file has one header, and a row has a cell for each of its columns. A record with
new columns rewrites its file with the wider header.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from dtrain.schema import Table
from dtrain.tracking.base import POSITION_KEYS, RunFacts, Tracker, scalars


@final
class CsvFiles(Tracker):
    """The numbers of a run as tables."""

    def __init__(self) -> None:
        self._folder = Path()
        self._headers: dict[str, list[str]] = {}

    def start(self, run: Table, facts: RunFacts) -> None:
        self._folder = facts.folder / "csv"
        self._folder.mkdir(exist_ok=True)

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        position = {key: values[key] for key in POSITION_KEYS if key in values}
        row = position | scalars(values)
        path = self._folder / f"{kind}.csv"
        header = self._headers.get(kind) or _read_header(path)
        new_columns = [name for name in row if name not in header]
        if new_columns:
            rows = _read_rows(path)
            header = [*header, *new_columns]
            draft = path.with_suffix(".part")
            _append_rows(draft, [header, *([old.get(name) for name in header] for old in rows)])
            draft.replace(path)
        self._headers[kind] = header
        _append_rows(path, [[row.get(name) for name in header]])


def _read_header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _append_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
