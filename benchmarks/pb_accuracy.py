"""Accuracy of pipelined backpropagation with delayed gradients and their mitigation, over SGD.

`ratio` = share of the gap to SGD that `both` closes, (both - plain) / (sgd - plain); `spread` = the
width of its 95 % bootstrap interval over seeds (paired, 10,000 resamples, seed 0).

Set-up: digits, an MLP of ten residual units with LayerNorm, a stem and a head, each a block of its
own, so that the gradient of block 0 has a delay of 22 updates; three epochs of batches of 4, SGD
with momentum 0.99, a constant learning rate. Settings and learning rate were fixed beforehand. The
learning rate is the best of four for SGD alone (`RATES`, by the mean test accuracy of six other
seeds, measured again in each start); all variants use it. Each run has one rank, and two runs are
trained at a time: the layout does not change the trained model.

The momentum is high because the batch is small: 0.9 for batches of 32 is 0.987 for batches of 4
(`scale-from`). With 0.9 the delay is longer than the momentum's time constant, and compensation
costs more accuracy than it gains.

* `sgd`: the same updates without delay (`1f1b`, one micro-batch)
* `plain`: `pipelined`; `spike`: with spike compensation; `prediction`: with weight prediction
  (LWP-v); `both`; `stash`: with weight stashing

`figures` has the mean test accuracy (0-1) over the seeds, `peer` that of `sgd`. `shares` has share
and interval of every variant, `gap_errors` the gap in paired standard errors, `accuracies` all
runs.

    python benchmarks/pb_accuracy.py [--quick]

Label: measured. Time: starts of at most 35 minutes; each prints how many runs are left. `--quick`:
two seeds, one epoch, no tuning.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from statistics import mean, stdev
from typing import Any

import numpy as np
from bench import Bench, exit_if_incomplete, parse_quick
from record import publish

from dtrain.schema import Table

DEPTH, WIDTH, BATCH, EPOCHS = 10, 32, 4, 3
MOMENTUM, LR = 0.99, 0.001
RATES = (0.0005, 0.001, 0.002, 0.004)
SEEDS, TUNED = range(20), range(100, 106)
BUDGET_S = 35 * 60
PIPELINED = {"name": "pipelined"}
VARIANTS: dict[str, Table] = {
    "sgd": {"name": "1f1b"},
    "plain": PIPELINED,
    "spike": PIPELINED | {"compensation": "spike"},
    "prediction": PIPELINED | {"prediction": "velocity"},
    "both": PIPELINED | {"prediction": "velocity", "compensation": "spike"},
    "stash": PIPELINED | {"weights": "stash"},
}
Cell = tuple[str, str, int, float]
"""Name, variant, seed and learning rate of one run."""


def main() -> None:
    """Train the missing cells; publish the record once all are there."""
    quick = parse_quick(__doc__)
    bench, seeds = Bench("pb_accuracy", quick), range(2) if quick else SEEDS
    epochs = 1 if quick else EPOCHS
    tuning = [(f"rate-{lr}-{s}", "sgd", s, lr) for lr in RATES for s in TUNED]
    cells = [(f"{name}-{seed}", name, seed, LR) for seed in seeds for name in VARIANTS]
    results = train_cells(bench, cells if quick else [*tuning, *cells], epochs)
    accuracies = {name: [results[f"{name}-{seed}"] for seed in seeds] for name in VARIANTS}
    rates = {} if quick else {lr: mean(results[f"rate-{lr}-{s}"] for s in TUNED) for lr in RATES}
    if rates and max(rates, key=lambda lr: rates[lr]) != LR:
        print(f"the best rate for SGD is not {LR}: {rates}", file=sys.stderr)
    gaps = [a - b for a, b in zip(accuracies["sgd"], accuracies["plain"], strict=True)]
    shares = {
        name: closed_share(accuracies, name) for name in VARIANTS if name not in ("sgd", "plain")
    }
    both = shares["both"]
    publish(
        "pb_accuracy",
        "measured",
        {name: mean(values) for name, values in accuracies.items() if name != "sgd"},
        {name: mean(accuracies["sgd"]) for name in accuracies if name != "sgd"},
        both["share"],
        both["high"] - both["low"],
        quick=quick,
        shares=shares,
        gap=mean(gaps),
        gap_errors=mean(gaps) / (stdev(gaps) / sqrt(len(gaps))),
        accuracies=accuracies,
        rates={str(lr): value for lr, value in rates.items()},
    )


def train_cells(bench: Bench, cells: list[Cell], epochs: int) -> dict[str, float]:
    """Return the test accuracies of all cells, two trained at a time; end when time is up."""
    end = time.monotonic() + BUDGET_S

    def train_cell(cell: Cell) -> tuple[str, float] | None:
        name, variant, seed, lr = cell
        if time.monotonic() > end and not bench.has(name):
            return None

        def measure() -> dict[str, Any]:
            result = bench.train(make_run(variant, seed, lr, epochs), 1, subfolder=name)
            return {"test_accuracy": result.summary["test_accuracy"]}

        return name, float(bench.cached(name, measure)["test_accuracy"])

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(train_cell, cells))
    exit_if_incomplete(results.count(None))
    return dict(filter(None, results))


def make_run(variant: str, seed: int, lr: float, epochs: int) -> Table:
    """Return the run file of a cell."""
    return {
        "seed": seed,
        "epochs": epochs,
        "batch-size": BATCH,
        "data": {"name": "digits"},
        "model": {"name": "user:deep", "inputs": 64, "width": WIDTH, "depth": DEPTH},
        "partition": {"blocks": DEPTH + 2},
        "objective": {"name": "backprop"},
        "schedule": VARIANTS[variant],
        "optimizer": {"name": "sgd", "lr": lr, "momentum": MOMENTUM},
        "evaluate": {"every": epochs},
    }


def closed_share(accuracies: dict[str, list[float]], name: str) -> dict[str, float]:
    """Return the share of the gap that a variant closes, with its 95 % bootstrap interval."""
    sgd, plain, variant = (np.array(accuracies[key]) for key in ("sgd", "plain", name))
    resamples = np.random.default_rng(0).integers(0, len(sgd), (10_000, len(sgd)))
    with np.errstate(divide="ignore", invalid="ignore"):
        gains, gaps = (variant - plain)[resamples].mean(1), (sgd - plain)[resamples].mean(1)
        shares = gains / gaps
    low, high = np.nanpercentile(shares, [2.5, 97.5])
    share = float((variant - plain).mean() / (sgd - plain).mean())
    return {"share": share, "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
