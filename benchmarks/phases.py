"""What `slow_link` runs, and what follows from it: run files, phases, time to accuracy.

Invariant: pure; a segment of the timing part is whole rounds of its strategy, after which nothing
is in flight, so that its length over its updates is what an update costs.

::

    daso    | warm-up, blocking | cycling, S = 8, B = 2 | cool-down, blocking |
    qsr     | short: H = 4      | long: H = 24          |
    others  | steady            |                                             an epoch each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import median
from typing import Any

from bench import Told

from dtrain.tables import Table

NODES, EACH, ROWS = 2, 2, 32
"""Hosts, ranks of each, samples of a rank in an update."""
BATCH = NODES * EACH * ROWS
SYNCS: dict[str, Table] = {
    "every-step": {"name": "every-step"},
    "daso": {"name": "daso", "warmup-epochs": 1, "cooldown-epochs": 1},
    "local-sgd": {"name": "local-sgd"},
    "qsr": {"name": "qsr"},
    "diloco": {"name": "diloco"},
}
PHASES = {"daso": ("warm-up", "cycling", "cool-down"), "qsr": ("short", "long")}
STEADY = ("steady",)
SHORT, LONG = 4, 24
"""Updates of a round of `qsr` at the peak rate, and at that of the second epoch of its timing."""
ROUNDS = {"qsr": LONG, "diloco": 50}
SEGMENTS = 4
"""Segments of an epoch of the timing part; the last, which has the epoch's end, is not timed."""
POINT = 0.01
SENT = "bytes_inter_node_per_update"

Row = dict[str, Any]


def rounds(name: str) -> int:
    """Return the updates of a segment of the timing part: whole rounds, 24 in three of them."""
    return ROUNDS.get(name, 8)


def base(name: str, lr: float) -> Table:
    """Return what the run files of all parts share."""
    return {
        "threads": 1,
        "batch-size": BATCH,
        "model": {"name": "mlp", "widths": [1024] * 7},
        "mesh": {"stages": 1, "placement": "replicas-in-node"},
        "partition": {"blocks": 1},
        "objective": {"name": "backprop"},
        "sync": SYNCS[name],
        "optimizer": {"name": "sgd", "lr": lr, "momentum": 0.9},
        "lr": {"name": "cosine"},
    }


def timed(name: str) -> Table:
    """Return the run file of the timing part: an epoch of noise for each phase."""
    per_epoch = SEGMENTS * rounds(name)
    data = {"name": "user:noise", "normalise": False, "rows": per_epoch * BATCH, "width": 3072}
    # H = floor((alpha / lr)^2) with alpha = 0.0175 / 0.008 of the peak rate.
    low = 0.0175 / 0.008 / sqrt(LONG + 0.5)
    return base(name, 0.01) | {
        "epochs": len(PHASES.get(name, STEADY)),
        "segment": rounds(name),
        "data": data,
        "lr": {"name": "step", "epochs": [1], "gamma": low} if name == "qsr" else {},
    }


def steps(name: str, told: Told) -> dict[str, list[float]]:
    """Return, by phase, the seconds of a step in each segment that does not end an epoch."""
    found: dict[str, list[float]] = {each: [] for each in PHASES.get(name, STEADY)}
    for record in told.trained:
        epoch, offset = divmod(record["update"], SEGMENTS * rounds(name))
        if offset:
            found[[*found][epoch]].append(record["train_s"] / rounds(name))
    return found


def middles(rows: Sequence[Row]) -> dict[str, float]:
    """Return, by phase, the median seconds of a step over all segments of all turns."""
    return {
        name: median(value for row in rows for value in row["step_s"][name])
        for name in rows[0]["step_s"]
    }


def reached(curve: Sequence[float], target: float) -> int | None:
    """Return after how many epochs the accuracy is at least `target`; None: after none.

    >>> reached([0.3, 0.5, 0.49], 0.5), reached([0.3], 0.5)
    (2, None)
    """
    return next((n for n, each in enumerate(curve, 1) if each >= target), None)


def spent(
    step_s: Mapping[str, float], epochs: int, whole: int, per_epoch: int, means: float
) -> float:
    """Return the seconds of the first `epochs` of a run of `whole` epochs.

    `step_s` holds the seconds of a step by phase; `means` are those of the whole run, and count
    for `qsr` alone, whose rounds grow with each: an upper bound, where the run does not go to its
    end. From t = work + mean / H at two H follow the seconds of the work and of a mean.

    >>> spent({"warm-up": 1.0, "cycling": 0.2, "cool-down": 1.0}, 3, 8, 10, 0)
    14.0
    >>> spent({"steady": 0.5}, 3, 8, 10, 0)
    15.0
    >>> round(spent({"short": 1.0 + 0.6 / 4, "long": 1.0 + 0.6 / 24}, 2, 8, 10, 5), 6)
    23.0
    """
    if "short" in step_s:
        mean = (step_s["short"] - step_s["long"]) / (1 / SHORT - 1 / LONG)
        return (step_s["long"] - mean / LONG) * epochs * per_epoch + mean * means
    if "cycling" in step_s:
        ends = [step_s["warm-up"]] + [step_s["cycling"]] * (whole - 2) + [step_s["cool-down"]]
        return per_epoch * sum(ends[:epochs])
    return per_epoch * epochs * step_s["steady"]


def summed(learnt: Mapping[str, Row], times: Mapping[str, Mapping[str, list[Row]]]) -> Row:
    """Return figures, the peer's and the tables that follow from all cells.

    Parameters
    ----------
    learnt : mapping
        Rows of the accuracy part by strategy: curve, updates, bytes per update.
    times : mapping
        Rows of the timing part by rate of the links and strategy, `ddp` among them, turn by turn.
    """
    base, epochs = learnt["every-step"], len(learnt["every-step"]["curve"])
    target, per_epoch = base["curve"][-1] - POINT, base["updates"] // epochs
    whole = reached(base["curve"], target) or epochs
    figures: dict[str, float] = {}
    peer: dict[str, float] = {}
    table: dict[str, Row] = {name: {**row, "links": {}} for name, row in learnt.items()}
    for link, rows in times.items():
        ddp = median(row["step_s"] for row in rows["ddp"])
        for name, row in table.items():
            own, count = middles(rows[name]), reached(row["curve"], target)
            labels = {f"{link} {name} {each} step_s": value for each, value in own.items()}
            figures |= labels
            peer |= dict.fromkeys(labels, ddp)
            # A mean of `every-step` is one per update, and all means are of the same bytes.
            row["means_per_update"] = row[SENT] / base[SENT]
            row["epochs"] = count
            row["links"][link] = {"step_s": own, **traffic(rows[name]), "to_accuracy_s": None}
            if count is not None:
                means = row["means_per_update"] * row["updates"]
                ours = spent(own, count, epochs, per_epoch, means)
                theirs = spent({"steady": ddp}, whole, epochs, per_epoch, 0)
                figures[f"{link} {name} to_accuracy_s"] = ours
                peer[f"{link} {name} to_accuracy_s"] = theirs
                row["links"][link] |= {"to_accuracy_s": ours, "of_peer": ours / theirs}
    return {"figures": figures, "peer": peer, "target": target, "strategies": table}


def traffic(rows: Sequence[Row]) -> Row:
    """Return counted bytes between the hosts, those of their interfaces, and these over those."""
    counted = sum(row["bytes_inter_node"] for row in rows)
    interface = sum(row["interface_bytes"] for row in rows)
    return {
        "bytes_inter_node": counted,
        "interface_bytes": interface,
        "interface_over_counted": interface / counted,
    }
