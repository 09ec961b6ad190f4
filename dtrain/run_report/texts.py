"""Numbers and facts of runs as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from dtrain.planning.formatting import percent, pluralise
from dtrain.run_report.run_record import RunRecord, host_counts

UNKNOWN = "-"


STATUS_TITLES = {
    "finished": "Finished",
    "running": "Running",
    "stopped": "Stopped",
    "failed": "Failed",
    "lost": "Ended without a record",
    "unknown": "Unknown",
}


def number_text(value: float | None, digits: int = 4) -> str:
    """Return a number with a few digits."""
    return UNKNOWN if value is None else f"{value:.{digits}g}"


def count_text(value: float | None) -> str:
    """Return a whole number with separators."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def metric_text(name: str, value: float | None) -> str:
    """Return the value of a metric; an accuracy is in percent."""
    if value is not None and "accuracy" in name and 0 <= value <= 1:
        return percent(value)
    return number_text(value)


def duration_text(seconds: float | None) -> str:
    """Return a time: "4.2 s", "3 min 20 s", "2 h 05 min"."""
    if seconds is None:
        return UNKNOWN
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def short_time_text(seconds: float) -> str:
    """Return a short time in the unit that suits it."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} µs"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def bytes_text(size: float | None) -> str:
    """Return a number of bytes in the unit that suits it."""
    if size is None:
        return UNKNOWN
    for unit, value in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= value:
            return f"{size / value:.3g} {unit}"
    return f"{size:.0f} bytes"


def date_text(unix_s: float | None) -> str:
    """Return a time of the clock, in UTC."""
    try:
        moment = datetime.fromtimestamp(unix_s or 0, UTC)
    except (OverflowError, ValueError, OSError):
        return UNKNOWN
    return moment.strftime("%Y-%m-%d %H:%M UTC") if unix_s else UNKNOWN


def ranks_text(run: RunRecord) -> str:
    """Return "4 = 2 replicas x 2 stages"."""
    if not run.ranks:
        return UNKNOWN
    replicas, stages = run.count("replicas"), run.count("stages")
    if not replicas or not stages:
        return str(run.ranks)
    mesh = f"{pluralise(replicas, 'replica')} × {pluralise(stages, 'stage')}"
    return f"{run.ranks:,} = {mesh}"


def hosts_text(run: RunRecord, most: int = 6) -> str:
    """Return the hosts with their ranks: "n1 (4 ranks), n2 (4 ranks)"."""
    counts = host_counts(run.hosts)
    shown = [f"{host} ({pluralise(n, 'rank')})" for host, n in [*counts.items()][:most]]
    more = [f"{len(counts) - most} more"] if len(counts) > most else []
    return ", ".join([*shown, *more]) or UNKNOWN


def length_text(run: RunRecord) -> str:
    """Return how much of its training a run did: "15 epochs, 675 updates"."""
    epochs = pluralise(run.count("epochs"), "epoch")
    updates = pluralise(run.count("updates"), "update")
    total = run.plan.updates
    if total > run.count("updates"):
        updates = f"{run.count('updates'):,} of {pluralise(total, 'update')}"
    return f"{epochs}, {updates}"


def parameters_text(run: RunRecord) -> str:
    """Return the number of parameters, local heads apart."""
    model = sum(_cell(block.get("parameters", "")) for block in run.plan.blocks)
    heads = sum(_cell(block.get("head", "")) for block in run.plan.blocks)
    if not model:
        return ""
    return f"{model:,} parameters" + (f", {heads:,} more in local heads" if heads else "")


def _cell(text: str) -> int:
    digits = text.replace(",", "")
    return int(digits) if digits.isdigit() and len(digits) < 20 else 0


def distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the names of runs; equal ones are numbered."""
    names: list[str] = []
    for run in runs:
        name, number = run.name, 2
        while name in names:
            name, number = f"{run.name} ({number})", number + 1
        names.append(name)
    return names


def note_text(runs: Sequence[object], name: str, text: str) -> str:
    """Return a sentence about one of several runs, which its name begins; of one run without."""
    return f"{name}: {text}" if len(runs) > 1 else text[:1].upper() + text[1:]


def absence_text(run: RunRecord) -> str:
    """Return why a folder lacks results."""
    reasons = {
        "running": "the run has not reached the end of its first segment",
        "failed": "the run failed before the end of its first segment",
        "stopped": "the run was stopped before the end of its first segment",
        "lost": "the run ended before the end of its first segment",
    }
    reason = reasons.get(run.status) if not run.count("updates") else None
    return reason or "its folder does not record this"
