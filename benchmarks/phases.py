"""What follows from the runs of `slow_link` and `slow_link_accuracy`: times of steps and targets.

Invariant: pure; a segment of the timing part has nothing in flight at its end, so that its length
over its updates is what an update costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from bench import Told
from strategies import CHANGES, LONG, SEGMENTS, SHORT, STRATEGIES, rounds

from dtrain.syncs.ab import AB
from dtrain.syncs.base import UpdateClock
from dtrain.syncs.oialr import OIALR

POINT = 0.01
SENT = "bytes_inter_node_per_update"

Row = dict[str, Any]


def steps(name: str, told: Told) -> dict[str, list[float]]:
    """Return, by phase, the seconds of a step in each segment that does not end an epoch."""
    phases = STRATEGIES[name].phases
    found: dict[str, list[float]] = {each: [] for each in phases}
    for epoch, last, record in _segments(name, told):
        if not last:
            found[phases[epoch]].append(record["train_s"] / rounds(name))
    return found


def changes(name: str, told: Told) -> dict[str, float]:
    """Return the seconds by which segments that end an epoch are longer than their steps, where a
    change of rank lies in them."""
    if name not in CHANGES:
        return {}
    own, phases = steps(name, told), STRATEGIES[name].phases
    return {
        CHANGES[name][epoch]: record["train_s"] - rounds(name) * median(own[phases[epoch]])
        for epoch, last, record in _segments(name, told)
        if last
    }


def _segments(name: str, told: Told) -> list[tuple[int, bool, Row]]:
    """Return epoch, whether it is the last of it, and the record of each segment."""
    found = []
    for record in told.trained:
        epoch, place = divmod(record["update"] // rounds(name) - 1, SEGMENTS)
        found.append((epoch, place == SEGMENTS - 1, record))
    return found


def middles(rows: Sequence[Row]) -> dict[str, float]:
    """Return, by phase, the median seconds of a step over all segments of all turns, and those of
    changes over the turns."""
    found = {
        name: median(value for row in rows for value in row["step_s"][name])
        for name in rows[0]["step_s"]
    }
    changed = {name: [row["changes_s"][name] for row in rows] for name in rows[0]["changes_s"]}
    return found | {name: median(values) for name, values in changed.items()}


def reached(curve: Sequence[float], target: float) -> int | None:
    """Return after how many epochs the accuracy is at least `target`; None: after none.

    >>> reached([0.3, 0.5, 0.49], 0.5), reached([0.3], 0.5)
    (2, None)
    """
    return next((n for n, each in enumerate(curve, 1) if each >= target), None)


def counts(name: str, epochs: int, whole: int, per_epoch: int) -> dict[str, int]:
    """Return how many updates of each phase, and changes, are in the first `epochs` of `whole`.

    >>> counts("daso", 3, 8, 10), counts("diloco", 3, 8, 10)
    ({'warm-up': 10, 'cycling': 20, 'cool-down': 0}, {'steady': 30})
    >>> counts("ab", 2, 3, 100)
    {'full': 126, 'low': 74, 'split': 4, 'merge': 4}
    >>> counts("oialr", 2, 3, 100)
    {'full': 30, 'low': 170, 'split': 1, 'round': 28}
    """
    updates, total = epochs * per_epoch, whole * per_epoch
    clock = UpdateClock(0, 0, per_epoch, total, 1.0, 1.0, False, ())
    match STRATEGIES[name].phases, name:
        case ("steady",), _:
            return {"steady": updates}
        case ("warm-up", *_), _:
            cooling = per_epoch * (epochs == whole)
            return {
                "warm-up": per_epoch,
                "cycling": updates - per_epoch - cooling,
                "cool-down": cooling,
            }
        case _, "ab":
            phases = AB().phases(clock)
            low = [phases.is_low_rank(update) for update in range(updates + 1)]
            turned = [b - a for a, b in pairwise(low)]
            split, merge = turned.count(1), turned.count(-1) + (low[-1] and epochs == whole)
            return {
                "full": updates - sum(low[:-1]),
                "low": sum(low[:-1]),
                "split": split,
                "merge": int(merge),
            }
        case _, "oialr":
            delay, every = OIALR().phase_lengths(clock)
            low_ = updates - delay
            return {"full": delay, "low": low_, "split": 1, "round": low_ // every}
    raise AssertionError(name)


def spent(
    name: str, step_s: Mapping[str, float], epochs: int, whole: int, per_epoch: int, means: float
) -> float:
    """Return the seconds of the first `epochs` of a run of `whole` epochs.

    `step_s` holds the seconds of a step by phase, and of changes; `means` are those of the whole
    run, and count for `qsr` alone, whose rounds grow with each: an upper bound, where the run does
    not go to its end. From t = work + mean / H at two H follow the seconds of the work and of a
    mean.

    >>> spent("daso", {"warm-up": 1.0, "cycling": 0.2, "cool-down": 1.0}, 3, 8, 10, 0)
    14.0
    >>> spent("diloco", {"steady": 0.5}, 3, 8, 10, 0)
    15.0
    >>> round(spent("qsr", {"short": 1.0 + 0.6 / 4, "long": 1.0 + 0.6 / 24}, 2, 8, 10, 5), 6)
    23.0
    """
    if "short" in step_s:
        mean = (step_s["short"] - step_s["long"]) / (1 / SHORT - 1 / LONG)
        return (step_s["long"] - mean / LONG) * epochs * per_epoch + mean * means
    found = counts(name, epochs, whole, per_epoch)
    return sum(count * step_s[each] for each, count in found.items())


def timings(times: Mapping[str, Mapping[str, list[Row]]]) -> Row:
    """Return figures, the peer's and the tables of the timing part.

    Parameters
    ----------
    times : mapping
        Rows by rate of the links and strategy, `ddp` among them, turn by turn.
    """
    figures: dict[str, float] = {}
    peer: dict[str, float] = {}
    links: dict[str, dict[str, Row]] = {}
    for link, rows in times.items():
        links[link] = {}
        for name in [each for each in rows if each != "ddp"]:
            own, phases = middles(rows[name]), STRATEGIES[name].phases
            labels = {f"{link} {name} {each} step_s": own[each] for each in phases}
            figures |= labels
            peer |= dict.fromkeys(labels, median(row["step_s"] for row in rows["ddp"]))
            links[link][name] = {"step_s": own, **traffic(rows[name])}
    ddp = {link: rows["ddp"] for link, rows in times.items()}
    return {"figures": figures, "peer": peer, "links": links, "ddp": ddp}


def together(rows: Sequence[Row]) -> Row:
    """Return the row of several seeds: the mean accuracy per epoch, and `curves` seed by seed.

    >>> together([{"curve": [0.5], "updates": 9}, {"curve": [0.25], "updates": 9}])
    {'curve': [0.375], 'updates': 9, 'curves': [[0.5], [0.25]]}
    """
    curves = [row["curve"] for row in rows]
    return rows[0] | {
        "curve": [fmean(each) for each in zip(*curves, strict=True)],
        "curves": curves,
    }


def joined(learnt: Mapping[str, Row], steps: Row) -> Row:
    """Return the times to accuracy, the peer's, and the tables that follow from both parts.

    Parameters
    ----------
    learnt : mapping
        Rows of the accuracy part by strategy: curve, updates, bytes per update.
    steps : mapping
        The record of the timing part.
    """
    first, epochs = learnt["every-step"], len(learnt["every-step"]["curve"])
    target, per_epoch = first["curve"][-1] - POINT, first["updates"] // epochs
    whole = reached(first["curve"], target) or epochs
    figures: dict[str, float] = {}
    peer: dict[str, float] = {}
    table: dict[str, Row] = {name: {**row, "links": {}} for name, row in learnt.items()}
    for name, row in table.items():
        # A mean of `every-step` is one per update, and all means are of the same bytes.
        row["means_per_update"] = row[SENT] / first[SENT] / STRATEGIES[name].part
        row["epochs"] = reached(row["curve"], target)
    for link, rows in steps["links"].items():
        theirs = median(row["step_s"] for row in steps["ddp"][link]) * whole * per_epoch
        for name, row in table.items():
            means, own = row["means_per_update"] * row["updates"], rows[name]["step_s"]
            run_s = spent(name, own, epochs, epochs, per_epoch, means)
            row["links"][link] = {"run_s": run_s, "to_accuracy_s": None}
            if row["epochs"] is None:
                continue
            ours = spent(name, own, row["epochs"], epochs, per_epoch, means)
            figures[f"{link} {name} to_accuracy_s"] = ours
            peer[f"{link} {name} to_accuracy_s"] = theirs
            row["links"][link] |= {"to_accuracy_s": ours, "of_peer": ours / theirs}
    tables = {"target": target, "strategies": table, "steps": steps["commit"]}
    return {"figures": figures, "peer": peer, **tables}


def counted(told: Told) -> dict[str, float]:
    """Return the counted bytes of a run, inside nodes and between them."""
    return {key: told.summary[key] for key in ("bytes_intra_node", "bytes_inter_node")}


def traffic(rows: Sequence[Row]) -> Row:
    """Return counted bytes between the hosts, those of their interfaces, and these over those."""
    ours = sum(row["bytes_inter_node"] for row in rows)
    interface = sum(row["interface_bytes"] for row in rows)
    return {
        "bytes_inter_node": ours,
        "interface_bytes": interface,
        "interface_over_counted": interface / ours,
    }
