"""`dtrain status`: how far a run is, how fast it is, and when it will end.

Invariant: reads files only, with neither torch nor MPI, and of a long log only the end.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dtrain.checkpoint.safe_files import Table, as_count, as_number, as_numbers, as_text
from dtrain.planning.formatting import percent, pluralise
from dtrain.run_report.run_record import RunRecord, read_checkpoints, read_run_record
from dtrain.run_report.texts import (
    STATUS_TITLES,
    count_text,
    duration_text,
    hosts_text,
    metric_text,
    number_text,
    ranks_text,
)

METRICS_BYTES = 2**20
"""Bytes of the end of `metrics.jsonl` that are read."""


BAR = 30
"""Characters of the bar."""


MAX_BLOCKS = 8
"""Blocks whose losses are shown."""


def run_status(folder: str | Path, now: float | None = None) -> dict[str, Any]:
    """Return the state of a running or ended run, as plain values; what is not known is None.

    Parameters
    ----------
    now : float, optional
        Seconds since 1970; default: this moment.

    Returns
    -------
    dict
        `status`, `update`, `updates`, `epoch`, `epochs`, `attempt`, `updates_per_s`,
        `samples_per_s`, `left_s`, `wall_s`, `record_age_s`, `train_loss_per_block`, `test_loss`,
        `metrics`, `slowest`, `checkpoint`, `owner`, `error` and `error_key`.

    Raises
    ------
    ConfigError
        The folder is no run folder.
    """
    run = read_run_record(Path(folder), METRICS_BYTES)
    now = time.time() if now is None else now
    latest = run.records[-1] if run.records else {}
    train = _latest(run, "train")
    update = as_count(latest.get("update"))
    update = run.count("updates") if update is None else update
    updates = run.plan.updates or None
    per_epoch = run.plan.updates_per_epoch
    pace, age_s = _updates_per_s(run), _age(as_number(latest.get("unix_s")), now)
    evaluation = _latest(run, "eval")
    return {
        "folder": str(run.folder),
        "status": run.status,
        "update": update,
        "updates": updates,
        "epoch": update / per_epoch if per_epoch else as_number(latest.get("epoch")),
        "epochs": updates / per_epoch if updates and per_epoch else None,
        "attempt": as_count(latest.get("attempt")),
        "updates_per_s": pace,
        "samples_per_s": as_number(train.get("samples_per_s")),
        "left_s": _left_s(run, update, pace, age_s),
        "wall_s": as_number(latest.get("time_s")),
        "record_age_s": age_s,
        "train_loss_per_block": as_numbers(train.get("loss")),
        "test_loss": as_number(evaluation.get("test_loss")),
        "metrics": _metrics(run, evaluation),
        "slowest": _slowest(train),
        "checkpoint": _checkpoint(run.folder, now),
        "owner": {key: run.owner[key] for key in ("host", "process", "job") if key in run.owner},
        "error": run.error or None,
        "error_key": run.error_key or None,
    }


def status_text(folder: str | Path, now: float | None = None) -> str:
    """Return the state of a run for people."""
    run = read_run_record(Path(folder), METRICS_BYTES)
    state = run_status(folder, now)
    lines = [
        ("run", as_text(state["folder"])),
        ("status", _status_line(state)),
        ("ranks", f"{ranks_text(run)}, on {hosts_text(run)}" if run.ranks else ""),
        ("progress", _progress_line(state)),
        ("pace", _pace_line(state)),
        ("time", _time_line(state)),
        ("loss", _loss_line(state)),
        ("test", ", ".join(f"{k} {metric_text(k, v)}" for k, v in state["metrics"].items())),
        ("slowest", _slowest_line(state["slowest"])),
        ("saved", _checkpoint_line(state["checkpoint"])),
        ("error", _error_line(state)),
        ("next", _next_line(state)),
    ]
    return "".join(f"{name:<9} {text}\n" for name, text in lines if text)


def _latest(run: RunRecord, kind: str) -> Table:
    return next((record for record in reversed(run.records) if record.get("kind") == kind), {})


def _metrics(run: RunRecord, evaluation: Table) -> dict[str, float | None]:
    """Return the metrics of the latest evaluation, those of the summary where there is none."""
    history = [entry for entry in run.history if entry.get("metrics")]
    return dict(history[-1]["metrics"]) if history and evaluation else run.metrics


def _updates_per_s(run: RunRecord) -> float | None:
    """Return the updates per second of the latest attempt, evaluations and checkpoints included."""
    attempt = run.records[-1].get("attempt") if run.records else None
    points = [
        (as_number(record.get("update")), as_number(record.get("time_s")))
        for record in run.records
        if record.get("attempt") == attempt
    ]
    known = [(u, s) for u, s in points if u is not None and s is not None]
    if len(known) < 2:
        return None
    (first, start), (last, end) = known[0], known[-1]
    return (last - first) / (end - start) if end > start and last > first else None


def _age(unix_s: float | None, now: float) -> float | None:
    return None if unix_s is None else max(now - unix_s, 0.0)


def _left_s(run: RunRecord, update: int, pace: float | None, age_s: float | None) -> float | None:
    """Return the seconds until the end of a running run, from its latest record and its pace."""
    if run.status != "running" or not pace or run.plan.updates <= update:
        return None
    return max((run.plan.updates - update) / pace - (age_s or 0.0), 0.0)


def _slowest(train: Table) -> Table | None:
    """Return the slowest rank of the latest segment."""
    rank = as_count(train.get("slowest_rank"))
    if rank is None:
        return None
    return {
        "rank": rank,
        "host": as_text(train.get("slowest_host")),
        "busy_s": as_number(train.get("slowest_busy_s")),
        "stage_median_busy_s": as_number(train.get("stage_median_busy_s")),
        "train_s": as_number(train.get("train_s")),
    }


def _checkpoint(folder: Path, now: float) -> Table | None:
    checkpoints = read_checkpoints(folder)
    if not checkpoints:
        return None
    return {"update": checkpoints[-1].update, "age_s": _age(checkpoints[-1].unix_s, now)}


def _status_line(state: Table) -> str:
    title = STATUS_TITLES[state["status"]].lower()
    owner = state["owner"]
    if state["status"] == "running" and owner:
        job = f"job {owner['job']}, " if "job" in owner else ""
        process = as_text(f"{job}process {owner.get('process')} on {owner.get('host')}")
        title += f" ({process})"
    attempt = state["attempt"]
    return f"{title}, start number {attempt}" if attempt and attempt > 1 else title


def _progress_line(state: Table) -> str:
    update, updates = state["update"], state["updates"]
    if not updates:
        return pluralise(update, "update")
    share = min(update / updates, 1.0)
    bar = "#" * round(BAR * share)
    epochs = ""
    if state["epochs"]:
        epochs = f", epoch {number_text(state['epoch'])} of {number_text(state['epochs'])}"
    return f"[{bar:.<{BAR}}] {percent(share, 0)}, update {update:,} of {updates:,}{epochs}"


def _pace_line(state: Table) -> str:
    pace, rate = state["updates_per_s"], state["samples_per_s"]
    pace_text = count_text if (pace or 0) >= 1000 else number_text
    parts = [] if pace is None else [f"{pace_text(pace)} updates/s"]
    parts += [] if rate is None else [f"{count_text(rate)} samples/s in training"]
    return ", ".join(parts)


def _time_line(state: Table) -> str:
    if state["wall_s"] is None:
        return ""
    text = f"{duration_text(state['wall_s'])} so far"
    if state["status"] != "running":
        return duration_text(state["wall_s"])
    if state["left_s"] is not None:
        text += f", about {duration_text(state['left_s'])} left"
    return f"{text}; last record {duration_text(state['record_age_s'])} ago"


def _loss_line(state: Table) -> str:
    losses, test = state["train_loss_per_block"], state["test_loss"]
    parts = [f"training {number_text(losses[-1])}"] if losses else []
    if 1 < len(losses) <= MAX_BLOCKS:
        parts[0] += f" (blocks {', '.join(map(number_text, losses))})"
    return ", ".join([*parts, *([] if test is None else [f"test {number_text(test)}"])])


def _slowest_line(slowest: Table | None) -> str:
    if slowest is None or slowest["busy_s"] is None:
        return ""
    host = f" on {slowest['host']}" if slowest["host"] else ""
    median = slowest["stage_median_busy_s"]
    return (
        f"rank {slowest['rank']}{host}: busy {duration_text(slowest['busy_s'])} of the last "
        f"{duration_text(slowest['train_s'])} of training"
        + (f"; the median of its stage is {duration_text(median)}" if median is not None else "")
    )


def _checkpoint_line(checkpoint: Table | None) -> str:
    if checkpoint is None:
        return "no checkpoint yet"
    return f"update {checkpoint['update']:,}, {duration_text(checkpoint['age_s'])} ago"


def _error_line(state: Table) -> str:
    if not state["error"]:
        return ""
    key = f" [{state['error_key']}]" if state["error_key"] else ""
    return " ".join(state["error"].split()) + key


def _next_line(state: Table) -> str:
    """Return what to do next."""
    match state["status"]:
        case "stopped" if not state["error_key"]:  # it has saved
            return "the same command resumes from the last checkpoint"
        case "failed" | "stopped" | "lost" if state["checkpoint"] is None:
            return "fix the cause, then start the same command again"
        case "failed" | "stopped" | "lost":
            return "fix the cause; the same command resumes from the last checkpoint"
        case "finished":
            return f"dtrain report {as_text(state['folder'])}"
    return ""
