"""The record of one run: the facts that its folder holds, whatever state it is in.

Invariant: reads files only, with neither torch nor MPI. A fact that is not recorded is None or
empty.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from dtrain.checkpoint.ownership import OWNER_FILE, owner_is_gone
from dtrain.checkpoint.safe_files import (
    MAX_BYTES,
    Table,
    as_count,
    as_number,
    as_numbers,
    as_table,
    as_text,
    read_inside,
    read_json,
    read_json_lines,
    read_toml,
)
from dtrain.errors import ConfigError
from dtrain.run_report.plan_file import RunPlan, parse_plan

RUN_FILES = ("summary.json", "metrics.jsonl", OWNER_FILE)
"""A run folder has at least one of these."""


STATUSES = ("finished", "running", "stopped", "failed")


NOT_METRICS = ("loss", "kind", "hosts", "nodes", "copied_blocks", "layer_notes", "lr")
"""Keys of a record that are no metrics of blocks."""


@final
@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run."""

    update: int
    unix_s: float


@final
@dataclass(frozen=True)
class RunRecord:
    """The facts of a run folder.

    Attributes
    ----------
    folder : Path
        The run folder.
    name : str
        Its name, for people.
    summary : dict
        `summary.json`.
    records : tuple of dict
        The records of `metrics.jsonl`, in order.
    settings : dict
        The resolved run, as nested tables.
    plan : RunPlan
        The contents of `plan.txt`.
    owner : dict
        `owner.json`, empty where no process owns the folder.
    """

    folder: Path
    name: str
    summary: Table
    records: tuple[Table, ...]
    settings: Table
    plan: RunPlan
    owner: Table

    @property
    def status(self) -> str:
        """Status of the run: one of `STATUSES`, "lost" (its process is gone), or "unknown"."""
        status = as_text(self.summary.get("status"))
        if status not in STATUSES:
            return "unknown"
        if status == "running" and (not self.owner or owner_is_gone(self.owner)):
            return "lost"
        return status

    @property
    def error(self) -> str:
        """The error of a run that failed, or the reason for which it was stopped."""
        reason = self.summary.get("stop_reason") if self.status == "stopped" else None
        return as_text(self.summary.get("error") or reason)

    @property
    def error_key(self) -> str:
        """The stable name of the error."""
        return as_text(self.summary.get("error_key"))

    @cached_property
    def start_record(self) -> Table:
        """The record of the latest start."""
        return next((r for r in reversed(self.records) if r.get("kind") == "run"), {})

    @property
    def nodes(self) -> list[str]:
        """The node of each rank, of the last start; the host where that is all that is known."""
        nodes = self.start_record.get("nodes")
        return [str(node) for node in nodes] if isinstance(nodes, list) else self.hosts

    @property
    def hosts(self) -> list[str]:
        """The host of each rank."""
        hosts = self.start_record.get("hosts")
        return [as_text(host) for host in hosts] if isinstance(hosts, list) else []

    @property
    def ranks(self) -> int:
        """Number of ranks, 0 where it is not known."""
        return self.count("ranks") or len(self.hosts)

    @cached_property
    def history(self) -> list[Table]:
        """One entry per recorded point of the training; see `make_history`."""
        return make_history(self.records, self.plan.updates_per_epoch)

    @property
    def metrics(self) -> dict[str, float | None]:
        """The metrics of the latest test, by name."""
        metrics = as_table(self.summary.get("metrics"))
        return {as_text(name): as_number(value) for name, value in metrics.items()}

    def number(self, key: str) -> float | None:
        """Return a number of the summary."""
        return as_number(self.summary.get(key))

    def count(self, key: str) -> int:
        """Return a whole number of the summary, 0 where it is not known."""
        return as_count(self.summary.get(key)) or 0

    def numbers(self, key: str) -> list[float | None]:
        """Return a list of numbers of the summary."""
        return as_numbers(self.summary.get(key))

    def setting(self, *keys: str) -> Any:
        """Return a value of the resolved run, None where it is not set."""
        value: Any = self.settings
        for key in keys:
            value = as_table(value).get(key)
        return value

    def strategy(self, section: str) -> str:
        """Return the name of a strategy, such as that of the objective."""
        return as_text(self.setting(section, "name"))


def read_run_record(folder: Path, metrics_bytes: int = MAX_BYTES) -> RunRecord:
    """Return the facts of a run folder.

    Parameters
    ----------
    metrics_bytes : int
        Bytes of the end of `metrics.jsonl` that are read.

    Raises
    ------
    ConfigError
        It is no run folder.
    """
    if not any((folder / name).exists() for name in RUN_FILES):
        raise ConfigError(
            "report.no-run",
            f"{folder} is no run folder: it has no {RUN_FILES[0]}; give the folder that `dtrain "
            "train` names in its last lines, such as runs/demo",
        )
    records = tuple(read_json_lines(folder, "metrics.jsonl", metrics_bytes))
    starts = [record for record in records if record.get("kind") == "run"]
    settings = read_toml(folder, "run.toml")
    return RunRecord(
        folder=folder,
        name=as_text(folder.resolve().name) or "run",
        summary=read_json(folder, "summary.json"),
        records=records,
        settings=settings or (as_table(starts[-1].get("resolved")) if starts else {}),
        plan=parse_plan(read_inside(folder, "plan.txt")),
        owner=read_json(folder, OWNER_FILE),
    )


def make_history(records: Iterable[Mapping[str, Any]], updates_per_epoch: int = 0) -> list[Table]:
    """Return one entry per recorded point of the training, in order.

    An update that a later attempt repeats has the values of that attempt.

    Parameters
    ----------
    records : iterable of mapping
        The records of `metrics.jsonl`.
    updates_per_epoch : int
        For the epochs of points inside of an epoch; 0 if it is not known.

    Returns
    -------
    list of dict
        `update`, `epoch` (with a fraction inside of an epoch), `train_loss`, `train_loss_per_block`
        and, where they were recorded, `samples_per_s`, `block_metrics` by name, and the values of
        the evaluation: `test_loss`, `metrics` and `accuracy_per_block`.
    """
    entries: dict[int, Table] = {}
    for record in records:
        update, kind = as_count(record.get("update")), record.get("kind")
        if update is None or kind not in ("run", "train", "eval"):
            continue
        if kind == "run":  # it continues from here
            entries = {done: entry for done, entry in entries.items() if done <= update}
            continue
        epoch = update / updates_per_epoch if updates_per_epoch else as_number(record.get("epoch"))
        entry = entries.setdefault(update, {"update": update, "epoch": epoch})
        entry.update(_train_values(record) if kind == "train" else _eval_values(record))
    return [entries[update] for update in sorted(entries)]


def _train_values(record: Mapping[str, Any]) -> Table:
    losses = as_numbers(record.get("loss"))
    metrics = {
        as_text(name): as_numbers(value)
        for name, value in record.items()
        if isinstance(value, list) and name not in NOT_METRICS
    }
    return {
        "train_loss": losses[-1] if losses else None,
        "train_loss_per_block": losses,
        "samples_per_s": as_number(record.get("samples_per_s")),
        "block_metrics": metrics,
    }


def _eval_values(record: Mapping[str, Any]) -> Table:
    """Return the losses of an evaluation by their keys, and its metrics by name."""
    values: Table = {
        as_text(name): as_number(value) for name, value in record.items() if name.endswith("_loss")
    }
    metrics = as_table(record.get("metrics"))
    return values | {
        "metrics": {as_text(name): as_number(value) for name, value in metrics.items()},
        "accuracy_per_block": as_numbers(record.get("accuracy_per_block")),
    }


def host_counts(hosts: Sequence[str]) -> dict[str, int]:
    """Return the number of ranks by host."""
    return dict(Counter(hosts))


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run, by update."""
    checkpoints = []
    root = folder.resolve()
    try:
        for path in (folder / "checkpoints").iterdir():
            match = re.fullmatch(r"update-(\d{1,12})", path.name)
            manifest = path / "manifest.json"
            if match and manifest.resolve().is_relative_to(root) and manifest.is_file():
                checkpoints.append(Checkpoint(int(match[1]), manifest.stat().st_mtime))
    except (OSError, RuntimeError):
        pass
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.update)


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested tables as "section.key": value, as a run file writes them."""
    rows: dict[str, str] = {}
    for key, value in table.items():
        name = f"{prefix}{as_text(str(key))}"
        if isinstance(value, dict):
            rows |= flatten(value, f"{name}.")
        else:
            rows[name] = _setting_text(value)
    return rows


def _setting_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_setting_text, value[:50]))}]"
    return as_text(str(value))


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the keys of run files whose values differ, with the value of each run."""
    tables = [flatten(run.settings) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key, "-") for table in tables] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}
