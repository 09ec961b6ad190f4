"""Several runs as one table, the best first: the runs of a sweep, or of any folders.

Invariant: reads files only, with neither torch nor MPI. A run that has not started or has failed
has its row, too.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from dtrain.checkpoint.files import replacing
from dtrain.checkpoint.safe_files import as_number, as_numbers, as_table, as_text
from dtrain.errors import ConfigError, unknown_name
from dtrain.planning.formatting import align_columns, pluralise
from dtrain.run_report.run_record import (
    RUN_FILES,
    RunRecord,
    differing_settings,
    read_run_record,
)
from dtrain.run_report.texts import UNKNOWN, distinct_names, duration_text, metric_text

METRICS_BYTES = 2**20
"""Bytes of the end of `metrics.jsonl` that are read."""


CSV_NAME = "sweep.csv"
"""The table in the folder of a sweep."""


LOWER_IS_BETTER = ("loss", "perplexity", "mae", "mse", "rmse")
"""Metrics of which the smallest value is the best."""


LOSSES = ("train_loss", "test_loss", "validation_loss")


PREFIXES = ("validation_", "test_")
"""Splits of a metric, the one to choose by first."""


COUNTS = {
    "epochs": "epochs_done",
    "updates": "updates_done",
    "wall_s": "wall_s",
    "samples_per_s": "samples_per_s",
}
"""Keys of the summary and the names of their values, which stand after metrics and losses."""


WAITING = "not started"


MAX_WRITES = 5
"""Times that a table is written whose runs change meanwhile."""


@final
@dataclass(frozen=True)
class RunRow:
    """One run of a table.

    Attributes
    ----------
    name : str
        Name of its folder.
    status : str
        As `dtrain status` has it, or "not started".
    settings : dict of str to str
        The keys of run files that differ between the runs of the table.
    values : dict of str to float
        Metrics and losses (`test_accuracy`, `validation_loss`, ...) and `COUNTS`.
    error : str
        Key of the error of a run that failed.
    """

    name: str
    status: str
    settings: dict[str, str]
    values: dict[str, float]
    error: str


@final
@dataclass(frozen=True)
class RunTable:
    """Several runs, the best first.

    Attributes
    ----------
    folder : Path or None
        The folder of all runs; None: they were named one by one.
    rows : tuple of RunRow
        The runs; those without a value come last.
    sorted_by : str
        Name of the value that sorts them; "": no run has any.
    """

    folder: Path | None
    rows: tuple[RunRow, ...]
    sorted_by: str

    def columns(self) -> list[str]:
        """Return the names of the values that a run has."""
        names = dict.fromkeys(name for row in self.rows for name in row.values)
        return sorted(names, key=lambda name: (name != self.sorted_by, name in COUNTS.values()))

    def setting_keys(self) -> list[str]:
        """Return the keys of run files that differ."""
        return [*dict.fromkeys(key for row in self.rows for key in row.settings)]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as plain values."""
        return [
            {"run": row.name, "status": row.status, "error_key": row.error or None}
            | {"settings": row.settings, "values": row.values}
            for row in self.rows
        ]


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return any((folder / name).exists() for name in RUN_FILES)


def inner_run_folders(folder: Path) -> list[Path]:
    """Return the run folders in a folder, by name, without those that were set aside."""
    try:
        inner = [path for path in folder.iterdir() if is_run_folder(path)]
    except OSError:
        return []
    return sorted(path for path in inner if not re.search(r"\.old-\d+$", path.name))


def holds_runs(folder: Path) -> bool:
    """Return whether a folder is no run folder, but holds some."""
    return not is_run_folder(folder) and bool(inner_run_folders(folder) or _waiting(folder))


def expand_folders(folders: Iterable[Path]) -> list[Path]:
    """Return run folders; in the place of a folder that holds some, those."""
    return [
        path
        for folder in folders
        for path in (inner_run_folders(folder) if holds_runs(folder) else [folder])
    ]


def read_run_table(folders: Sequence[Path], sort: str | None = None) -> RunTable:
    """Return the table of the runs in one folder, or of several run folders.

    Parameters
    ----------
    sort : str, optional
        Name of the value that sorts the rows; default: the first metric, on the validation split
        where there is one, else the loss.

    Raises
    ------
    ConfigError
        A folder is no run folder, or no run has the value `sort`.
    """
    runs = [read_run_record(path, METRICS_BYTES) for path in expand_folders(folders)]
    settings, names = differing_settings(runs), distinct_names(runs)
    rows = [
        RunRow(
            name,
            run.status,
            {key: values[i] for key, values in settings.items()},
            _values(run),
            run.error_key,
        )
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    parent = folders[0] if len(folders) == 1 and holds_runs(folders[0]) else None
    rows += [RunRow(name, WAITING, {}, {}, "") for name in (_waiting(parent) if parent else ())]
    known = dict.fromkeys(name for row in rows for name in row.values)
    if sort is not None and sort not in known:
        raise unknown_name("value to sort by", sort, known, key="compare.unknown-value")
    name = sort or _first_metric(known)
    sign = -1 if is_higher_better(name) else 1
    rows.sort(key=lambda row: (name not in row.values, sign * row.values.get(name, 0.0)))
    return RunTable(parent, tuple(rows), name)


def is_higher_better(name: str) -> bool:
    """Return whether the largest value of a metric is the best, by its name."""
    return not any(name == low or name.endswith(f"_{low}") for low in LOWER_IS_BETTER)


def _waiting(folder: Path) -> list[str]:
    """Return the names of the empty folders that `dtrain submit` made for the runs of a sweep."""
    try:
        empty = [p.name for p in folder.iterdir() if p.is_dir() and not any(p.iterdir())]
    except OSError:
        return []
    return sorted(name for name in empty if "=" in name)


def _first_metric(names: Iterable[str]) -> str:
    """Return the value that runs are compared by."""
    found = [name for name in names if name not in COUNTS.values()]
    for prefix in PREFIXES:
        of_split = [name for name in found if name.startswith(prefix)]
        metrics = [name for name in of_split if name != f"{prefix}loss"]
        if of_split:
            return (metrics or of_split)[0]
    return found[0] if found else ""


def _values(run: RunRecord) -> dict[str, float]:
    """Return the latest metrics, losses and counts of a run; those that are known."""
    values: dict[str, float | None] = {}
    for record in (*run.records, run.summary):
        for prefix, key in zip(PREFIXES, ("validation_metrics", "metrics"), strict=True):
            metrics = as_table(record.get(key))
            values |= {f"{prefix}{as_text(n)}": as_number(v) for n, v in metrics.items()}
        losses = as_numbers(record.get("loss"))
        values |= {"train_loss": losses[-1]} if losses else {}
        names = {name: name for name in LOSSES} | COUNTS
        values |= {name: as_number(record[key]) for key, name in names.items() if key in record}
    return {name: value for name, value in values.items() if value is not None}


def table_text(table: RunTable) -> str:
    """Return a table for people."""
    shown = [name for name in table.columns() if name not in ("updates_done", "samples_per_s")]
    keys = [key for key in table.setting_keys() if not _is_in_names(key, table.rows)]
    rows = [["run", *keys, "status", *(name.replace("_", " ") for name in shown)]]
    rows[0] = ["time" if cell == "wall s" else cell for cell in rows[0]]
    for row in table.rows:
        settings = [row.settings.get(key, UNKNOWN) for key in keys]
        status = f"{row.status} [{row.error}]" if row.error else row.status
        values = [_value_text(name, row.values.get(name)) for name in shown]
        rows.append([row.name, *settings, status, *values])
    lines = align_columns(rows)
    counts = [(s, sum(row.status == s for row in table.rows)) for s in _statuses(table.rows)]
    total = ", ".join(f"{number} {status}" for status, number in counts)
    head = f"{pluralise(len(table.rows), 'run')}: {total}"
    if table.sorted_by:
        head += f"; the best {table.sorted_by.replace('_', ' ')} first"
    return "\n".join([head, *lines]) + "\n"


def _statuses(rows: Sequence[RunRow]) -> list[str]:
    return [*dict.fromkeys(row.status for row in rows)]


def _is_in_names(key: str, rows: Sequence[RunRow]) -> bool:
    """Return whether the names of all runs say the value of a key."""
    texts = [(f"{key}={row.settings[key]}", row) for row in rows if key in row.settings]
    return all(text in row.name.split(",") for text, row in texts)


def _value_text(name: str, value: float | None) -> str:
    return duration_text(value) if name == "wall_s" else metric_text(name, value)


def write_run_table(folders: Sequence[Path], path: Path, sort: str | None = None) -> RunTable:
    """Write the table of runs as CSV, and return it.

    Several tasks of an array may write it at the same time. Each reads the runs again after it has
    written, so the file that stays is that of the latest state.

    Raises
    ------
    ConfigError
        As `read_run_table`, or the file cannot be written.
    """
    table = read_run_table(folders, sort)
    for _ in range(MAX_WRITES):
        _write_csv(table, path)
        before, table = table, read_run_table(folders, sort)
        if table == before:
            break
    return table


def _write_csv(table: RunTable, path: Path) -> None:
    """Write a table as CSV; an earlier one is replaced whole."""
    keys, columns = table.setting_keys(), table.columns()
    try:
        with replacing(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["run", "status", "error_key", *keys, *columns])
            for row in table.rows:
                settings = [row.settings.get(key, "") for key in keys]
                values = [row.values.get(name, "") for name in columns]
                writer.writerow([row.name, row.status, row.error, *settings, *values])
    except OSError as error:
        raise ConfigError(
            "compare.unwritable", f"cannot write {path}: {error.strerror}; choose another file"
        ) from error
