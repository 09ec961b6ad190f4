"""Compute step times and times to accuracy from the runs of `slow_link` and `slow_link_accuracy`.

Invariant: pure; a segment of the timing part ends without messages in flight, so its seconds over
its updates are the cost of an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from bench import RunResult
from strategies import CHANGES, LONG, SEGMENTS, SHORT, STRATEGIES, segment_updates

from dtrain.syncs.ab import AB
from dtrain.syncs.base import UpdateClock
from dtrain.syncs.oialr import OIALR

POINT = 0.01
SENT = "bytes_inter_node_per_update"

Row = dict[str, Any]


def step_seconds(name: str, result: RunResult) -> dict[str, list[float]]:
    """Return, by phase, the seconds of a step in each segment that does not end an epoch."""
    phases = STRATEGIES[name].phases
    seconds: dict[str, list[float]] = {phase: [] for phase in phases}
    for epoch, ends_epoch, record in _segments(name, result):
        if not ends_epoch:
            seconds[phases[epoch]].append(record["train_s"] / segment_updates(name))
    return seconds


def change_seconds(name: str, result: RunResult) -> dict[str, float]:
    """Return the seconds of each change of rank.

    A change lies in the last segment of an epoch and takes the time beyond that of its steps.
    """
    if name not in CHANGES:
        return {}
    steps, phases = step_seconds(name, result), STRATEGIES[name].phases
    return {
        CHANGES[name][epoch]: record["train_s"]
        - segment_updates(name) * median(steps[phases[epoch]])
        for epoch, ends_epoch, record in _segments(name, result)
        if ends_epoch
    }


def _segments(name: str, result: RunResult) -> list[tuple[int, bool, Row]]:
    """Return the epoch, whether it ends there, and the record of each segment."""
    segments = []
    for record in result.train_records:
        epoch, index = divmod(record["update"] // segment_updates(name) - 1, SEGMENTS)
        segments.append((epoch, index == SEGMENTS - 1, record))
    return segments


def median_seconds(rows: Sequence[Row]) -> dict[str, float]:
    """Return the median seconds of a step by phase over all segments, and of each change."""
    steps = {
        phase: median(seconds for row in rows for seconds in row["step_s"][phase])
        for phase in rows[0]["step_s"]
    }
    changes = {
        change: median(row["changes_s"][change] for row in rows) for change in rows[0]["changes_s"]
    }
    return steps | changes


def epochs_to_target(curve: Sequence[float], target: float) -> int | None:
    """Return the first epoch with an accuracy of at least `target`; None if there is none.

    >>> epochs_to_target([0.3, 0.5, 0.49], 0.5), epochs_to_target([0.3], 0.5)
    (2, None)
    """
    return next((epoch for epoch, value in enumerate(curve, 1) if value >= target), None)


def count_updates(name: str, epochs: int, total_epochs: int, per_epoch: int) -> dict[str, int]:
    """Return the number of updates of each phase, and of changes, in the first `epochs`.

    >>> count_updates("daso", 3, 8, 10), count_updates("diloco", 3, 8, 10)
    ({'warm-up': 10, 'cycling': 20, 'cool-down': 0}, {'steady': 30})
    >>> count_updates("ab", 2, 3, 100)
    {'full': 126, 'low': 74, 'split': 4, 'merge': 4}
    >>> count_updates("oialr", 2, 3, 100)
    {'full': 30, 'low': 170, 'split': 1, 'round': 28}
    """
    updates, total = epochs * per_epoch, total_epochs * per_epoch
    clock = UpdateClock(0, 0, per_epoch, total, 1.0, 1.0, False, ())
    match STRATEGIES[name].phases, name:
        case ("steady",), _:
            return {"steady": updates}
        case ("warm-up", *_), _:
            cooling = per_epoch * (epochs == total_epochs)
            return {
                "warm-up": per_epoch,
                "cycling": updates - per_epoch - cooling,
                "cool-down": cooling,
            }
        case _, "ab":
            phases = AB().phases(clock)
            low = [phases.is_low_rank(update) for update in range(updates + 1)]
            transitions = [after - before for before, after in pairwise(low)]
            merges = transitions.count(-1) + (low[-1] and epochs == total_epochs)
            return {
                "full": updates - sum(low[:-1]),
                "low": sum(low[:-1]),
                "split": transitions.count(1),
                "merge": int(merges),
            }
        case _, "oialr":
            delay, every = OIALR().phase_lengths(clock)
            low_updates = updates - delay
            return {"full": delay, "low": low_updates, "split": 1, "round": low_updates // every}
    raise AssertionError(name)


def training_seconds(
    name: str,
    step_s: Mapping[str, float],
    epochs: int,
    total_epochs: int,
    per_epoch: int,
    means: float,
) -> float:
    """Return the seconds of the first `epochs` of a run of `total_epochs`.

    `step_s` holds the seconds of a step by phase, and of changes. `means` is the number of means of
    the whole run; only `qsr` needs it, since its rounds grow. For a shorter run it gives an upper
    bound. From t = work + mean / H at two values of H follow the seconds of work and of a mean.

    >>> training_seconds("daso", {"warm-up": 1.0, "cycling": 0.2, "cool-down": 1.0}, 3, 8, 10, 0)
    14.0
    >>> training_seconds("diloco", {"steady": 0.5}, 3, 8, 10, 0)
    15.0
    >>> qsr = {"short": 1.0 + 0.6 / 4, "long": 1.0 + 0.6 / 24}
    >>> round(training_seconds("qsr", qsr, 2, 8, 10, 5), 6)
    23.0
    """
    if "short" in step_s:
        mean = (step_s["short"] - step_s["long"]) / (1 / SHORT - 1 / LONG)
        return (step_s["long"] - mean / LONG) * epochs * per_epoch + mean * means
    counts = count_updates(name, epochs, total_epochs, per_epoch)
    return sum(count * step_s[phase] for phase, count in counts.items())


def timing_tables(times: Mapping[str, Mapping[str, list[Row]]]) -> Row:
    """Return our figures, the peer's and the tables of the timing part.

    Parameters
    ----------
    times : mapping
        Rows by rate of the links and strategy, `ddp` among them, one row per repetition.
    """
    figures: dict[str, float] = {}
    peer: dict[str, float] = {}
    links: dict[str, dict[str, Row]] = {}
    for link, rows in times.items():
        links[link] = {}
        for name in [name for name in rows if name != "ddp"]:
            seconds, phases = median_seconds(rows[name]), STRATEGIES[name].phases
            labels = {f"{link} {name} {phase} step_s": seconds[phase] for phase in phases}
            figures |= labels
            peer |= dict.fromkeys(labels, median(row["step_s"] for row in rows["ddp"]))
            links[link][name] = {"step_s": seconds, **interface_traffic(rows[name])}
    ddp = {link: rows["ddp"] for link, rows in times.items()}
    return {"figures": figures, "peer": peer, "links": links, "ddp": ddp}


def average_seeds(rows: Sequence[Row]) -> Row:
    """Return one row for several seeds: the mean accuracy per epoch, and `curves` by seed.

    >>> average_seeds([{"curve": [0.5], "updates": 9}, {"curve": [0.25], "updates": 9}])
    {'curve': [0.375], 'updates': 9, 'curves': [[0.5], [0.25]]}
    """
    curves = [row["curve"] for row in rows]
    return rows[0] | {
        "curve": [fmean(values) for values in zip(*curves, strict=True)],
        "curves": curves,
    }


def accuracy_tables(accuracies: Mapping[str, Row], timings: Row) -> Row:
    """Return the times to accuracy, the peer's, and the tables of both parts.

    Parameters
    ----------
    accuracies : mapping
        Rows of the accuracy part by strategy: curve, updates, bytes per update.
    timings : mapping
        The record of the timing part.
    """
    first, epochs = accuracies["every-step"], len(accuracies["every-step"]["curve"])
    target, per_epoch = first["curve"][-1] - POINT, first["updates"] // epochs
    peer_epochs = epochs_to_target(first["curve"], target) or epochs
    figures: dict[str, float] = {}
    peer: dict[str, float] = {}
    table: dict[str, Row] = {name: {**row, "links": {}} for name, row in accuracies.items()}
    for name, row in table.items():
        # `every-step` sends one mean per update, and all means of a strategy have the same size.
        row["means_per_update"] = row[SENT] / first[SENT] / STRATEGIES[name].mean_size
        row["epochs"] = epochs_to_target(row["curve"], target)
    for link, rows in timings["links"].items():
        ddp_step_s = median(row["step_s"] for row in timings["ddp"][link])
        peer_s = ddp_step_s * peer_epochs * per_epoch
        for name, row in table.items():
            means, step_s = row["means_per_update"] * row["updates"], rows[name]["step_s"]
            run_s = training_seconds(name, step_s, epochs, epochs, per_epoch, means)
            row["links"][link] = {"run_s": run_s, "to_accuracy_s": None}
            if row["epochs"] is None:
                continue
            our_s = training_seconds(name, step_s, row["epochs"], epochs, per_epoch, means)
            figures[f"{link} {name} to_accuracy_s"] = our_s
            peer[f"{link} {name} to_accuracy_s"] = peer_s
            row["links"][link] |= {"to_accuracy_s": our_s, "of_peer": our_s / peer_s}
    tables = {"target": target, "strategies": table, "steps": timings["commit"]}
    return {"figures": figures, "peer": peer, **tables}


def counted_bytes(result: RunResult) -> dict[str, float]:
    """Return the counted bytes of a run, inside nodes and between them."""
    return {key: result.summary[key] for key in ("bytes_intra_node", "bytes_inter_node")}


def interface_traffic(rows: Sequence[Row]) -> Row:
    """Return counted bytes between hosts, bytes sent by their interfaces, and the quotient."""
    counted = sum(row["bytes_inter_node"] for row in rows)
    interface = sum(row["interface_bytes"] for row in rows)
    return {
        "bytes_inter_node": counted,
        "interface_bytes": interface,
        "interface_over_counted": interface / counted,
    }
