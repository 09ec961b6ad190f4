"""`dtrain compare`: two runs key by key.

Invariant: reads files only, with neither torch nor MPI.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.checkpoint.safe_files import as_text
from dtrain.planning.formatting import align_columns
from dtrain.run_report.run_record import RunRecord, differing_settings, read_run_record
from dtrain.run_report.texts import (
    UNKNOWN,
    bytes_text,
    count_text,
    distinct_names,
    duration_text,
    metric_text,
    number_text,
    ranks_text,
)

Format = Callable[[float | None], str]


SUMMARY_KEYS: dict[str, tuple[str, Format]] = {
    "train_loss": ("training loss", number_text),
    "test_loss": ("test loss", number_text),
    "epochs": ("epochs", count_text),
    "updates": ("updates", count_text),
    "wall_s": ("total time", duration_text),
    "samples_per_s": ("samples per second", count_text),
    "bytes_intra_node": ("bytes inside nodes", bytes_text),
    "bytes_inter_node": ("bytes between nodes", bytes_text),
}
"""Keys of `summary.json` that are compared, with their names and formats."""


MAX_CELL = 48
"""Characters of a cell."""


def compare_runs(first: str | Path, second: str | Path) -> dict[str, Any]:
    """Return the differences of two runs, as plain values.

    Returns
    -------
    dict
        `settings`: the keys of the run files that differ, with both values. `results`: both values
        and their `ratio` (second over first) of metrics, speed, memory and bytes. `digest_equal`:
        whether the trained weights are equal, None where one of the digests is not known.

    Raises
    ------
    ConfigError
        One of the folders is no run folder.
    """
    runs = read_run_record(Path(first)), read_run_record(Path(second))
    results = {key: _pair(*values) for key, values in _values(*runs).items()}
    digests = [as_text(run.summary.get("digest")) for run in runs]
    return {
        "folders": [str(run.folder) for run in runs],
        "status": [run.status for run in runs],
        "settings": differing_settings(runs),
        "results": results,
        "digest_equal": digests[0] == digests[1] if all(digests) else None,
    }


def comparison_text(first: str | Path, second: str | Path) -> str:
    """Return the differences of two runs for people."""
    runs = read_run_record(Path(first)), read_run_record(Path(second))
    comparison = compare_runs(first, second)
    names = [_cell(name) for name in distinct_names(runs)]
    rows = [["result", *names, "ratio"], ["status", *comparison["status"], ""]]
    rows.append(["ranks", *map(ranks_text, runs), ""])
    for key, pair in comparison["results"].items():
        label, text = _format(key)
        values = [text(value) for value in pair["values"]]
        ratio = UNKNOWN if pair["ratio"] is None else f"{pair['ratio']:.3g}"
        rows.append([_cell(label), *values, ratio])
    settings = [[_cell(key), *map(_cell, v)] for key, v in comparison["settings"].items()]
    if settings:
        lines = align_columns([["setting", *names], *settings])
    else:
        lines = ["The run files do not differ in any key."]
    lines += ["", *align_columns(rows), "", _digest_line(comparison["digest_equal"])]
    return "\n".join(lines) + "\n"


def _values(first: RunRecord, second: RunRecord) -> dict[str, tuple[float | None, float | None]]:
    """Return the values of both runs by key; the metrics come first."""
    metrics = dict.fromkeys([*first.metrics, *second.metrics])
    values = {f"metrics.{m}": (first.metrics.get(m), second.metrics.get(m)) for m in metrics}
    values |= {key: (first.number(key), second.number(key)) for key in SUMMARY_KEYS}
    for key in ("peak_memory_bytes", "rss_bytes"):
        values[key] = _largest(first, key), _largest(second, key)
    utilisation = _mean(first), _mean(second)
    return values | {"utilisation": utilisation}


def _largest(run: RunRecord, key: str) -> float | None:
    return max((value for value in run.numbers(key) if value is not None), default=None)


def _mean(run: RunRecord) -> float | None:
    """Return the utilisation, averaged over stages."""
    values = [value for value in run.numbers("utilisation") if value is not None]
    return sum(values) / len(values) if values else None


def _pair(first: float | None, second: float | None) -> dict[str, Any]:
    ratio = second / first if first and second is not None else None
    return {"values": [first, second], "ratio": ratio}


def _format(key: str) -> tuple[str, Format]:
    """Return name and format of a key."""
    if key.startswith("metrics."):
        name = key.removeprefix("metrics.")
        return f"test {name}", lambda value: metric_text(name, value)
    others: dict[str, tuple[str, Format]] = {
        "peak_memory_bytes": ("largest peak memory of a rank", bytes_text),
        "rss_bytes": ("largest resident memory of a rank", bytes_text),
        "utilisation": ("utilisation, mean over stages", _percent_text),
    }
    return {**SUMMARY_KEYS, **others}[key]


def _percent_text(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def _cell(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…"


def _digest_line(equal: bool | None) -> str:
    match equal:
        case True:
            return "digest    equal: both runs have the same weights, bit for bit"
        case False:
            return "digest    different: the runs have different weights"
    return "digest    not known for both runs"
