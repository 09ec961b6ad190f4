"""What late gradients cost, and what gives it back: pipelined backpropagation against SGD.

Measured: digits, a perceptron of ten residual units with LayerNorm, a stem and a head, a block
each, so that the first one is 22 updates late; three epochs of batches of 4, SGD with momentum
0.99, a constant learning rate. Setting and rate stand here beforehand; the rate is the best of four
for SGD alone (`RATES`, by the mean test accuracy of six other seeds, measured again each time).
All variants use it. One rank each, two runs at a time: no layout changes what is learnt.

The momentum is high because the batch is small: 0.9 for batches of 32 is 0.987 for batches of 4
(`scale-from`). With 0.9 the delay is longer than a gradient lasts, and compensation loses more than
it gives.

* `sgd`: the same updates, none of them late (`1f1b`, one micro-batch)
* `plain`: `pipelined`; `spike`: with spike compensation; `prediction`: with velocity prediction;
  `both`; `stash`: with weight stashing

`figures` has the mean test accuracy (0-1) over the seeds, `peer` that of `sgd`. `ratio` = share of
the gap that `both` closes, (both - plain) / (sgd - plain); `spread` = the width of its 95 %
bootstrap interval over seeds (paired, 10,000 resamples, seed 0). `shares` has share and interval of
every variant, `gap_errors` the gap in paired standard errors, `accuracies` all runs.

    python benchmarks/pb_accuracy.py [--quick]

Cells are kept: a start works for at most 35 minutes, then says how many are left. `--quick`: two
seeds, one epoch, no tuning.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from statistics import mean, stdev
from typing import Any

import numpy as np
from bench import Bench, asked, complete
from record import publish

from dtrain.schema import Table

DEPTH, WIDTH, BATCH, EPOCHS = 10, 32, 4, 3
MOMENTUM, LR = 0.99, 0.001
RATES = (0.0005, 0.001, 0.002, 0.004)
SEEDS, TUNED = range(20), range(100, 106)
BUDGET_S = 35 * 60
LATE = {"name": "pipelined"}
VARIANTS: dict[str, Table] = {
    "sgd": {"name": "1f1b"},
    "plain": LATE,
    "spike": LATE | {"compensation": "spike"},
    "prediction": LATE | {"prediction": "velocity"},
    "both": LATE | {"prediction": "velocity", "compensation": "spike"},
    "stash": LATE | {"weights": "stash"},
}
Cell = tuple[str, str, int, float]
"""Its name, the variant, the seed, the learning rate."""


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = asked(__doc__)
    bench, seeds = Bench("pb_accuracy", quick), range(2) if quick else SEEDS
    epochs = 1 if quick else EPOCHS
    tuning = [(f"rate-{lr}-{s}", "sgd", s, lr) for lr in RATES for s in TUNED]
    cells = [(f"{name}-{seed}", name, seed, LR) for seed in seeds for name in VARIANTS]
    told = trained(bench, cells if quick else [*tuning, *cells], epochs)
    found = {name: [told[f"{name}-{seed}"] for seed in seeds] for name in VARIANTS}
    rates = {} if quick else {lr: mean(told[f"rate-{lr}-{s}"] for s in TUNED) for lr in RATES}
    if rates and max(rates, key=lambda lr: rates[lr]) != LR:
        print(f"the best rate for SGD is not {LR}: {rates}", file=sys.stderr)
    gaps = [a - b for a, b in zip(found["sgd"], found["plain"], strict=True)]
    shares = {name: share(found, name) for name in VARIANTS if name not in ("sgd", "plain")}
    both = shares["both"]
    publish(
        "pb_accuracy",
        "measured",
        {name: mean(values) for name, values in found.items() if name != "sgd"},
        {name: mean(found["sgd"]) for name in found if name != "sgd"},
        both["share"],
        both["high"] - both["low"],
        quick=quick,
        shares=shares,
        gap=mean(gaps),
        gap_errors=mean(gaps) / (stdev(gaps) / sqrt(len(gaps))),
        accuracies=found,
        rates={str(lr): value for lr, value in rates.items()},
    )


def trained(bench: Bench, cells: list[Cell], epochs: int) -> dict[str, float]:
    """Return the test accuracies of all cells, two trained at a time; leave when time is up."""
    until = time.monotonic() + BUDGET_S

    def one(cell: Cell) -> tuple[str, float] | None:
        name, variant, seed, lr = cell
        if time.monotonic() > until and not bench.has(name):
            return None

        def make() -> dict[str, Any]:
            told = bench.train(run(variant, seed, lr, epochs), 1, where=name)
            return {"test_accuracy": told.summary["test_accuracy"]}

        return name, float(bench.kept(name, make)["test_accuracy"])

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(one, cells))
    left = told.count(None)
    complete(left)
    return dict(filter(None, told))


def run(variant: str, seed: int, lr: float, epochs: int) -> Table:
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


def share(found: dict[str, list[float]], name: str) -> dict[str, float]:
    """Return the share of the gap that a variant closes, with its 95 % bootstrap interval."""
    sgd, plain, own = (np.array(found[each]) for each in ("sgd", "plain", name))
    drawn = np.random.default_rng(0).integers(0, len(sgd), (10_000, len(sgd)))
    with np.errstate(divide="ignore", invalid="ignore"):
        many = (own - plain)[drawn].mean(1) / (sgd - plain)[drawn].mean(1)
    low, high = np.nanpercentile(many, [2.5, 97.5])
    whole = float((own - plain).mean() / (sgd - plain).mean())
    return {"share": whole, "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
