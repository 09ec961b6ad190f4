"""Error of forecasters of an hourly series on three stages, over the seasonal-naive forecast.

`ratio` = mean absolute error of the seasonal-naive forecast over that of the worst of the four
cells, the median over seeds; `spread` = its range. A ratio of 1.25 is an error 20 % lower.

Set-up: a series made here, of unit amplitude in a period of a day and 0.7 in one of a week, with
autoregressive noise (coefficient 0.7, innovations of deviation 0.3), and four columns of sines and
cosines of hour and weekday. Windows of 48 hours, the next 24 hours of one column; the last 15 % of
the hours are the test split. `lstm` (three of 48 units) and `transformer` (three causal layers of
width 32), in three blocks on three stages, with backpropagation (`1f1b`) and with local heads
(`stream`); AdamW 3e-3 with a cosine, batch 64, seeds 0 to 2.

The seasonal-naive forecast is the value of the same hour a day or a week before; `peer` has both,
and the ratio compares with the better one. `optimum` is the error of a forecast that knows both
periods and the noise up to the last hour. Ranks are threads, so that nothing here is a time.

    python benchmarks/series_forecast.py [--quick]

Label: measured. `--quick`: 24 weeks in place of 80, 8 epochs in place of 10, one seed.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from bench import Bench, parse_quick, spread
from numpy.typing import NDArray
from record import publish

from dtrain.schema import Table

DAY, WEEK = 24, 168
LENGTH, HORIZON, TEST = 48, 24, 0.15
WEEKLY, COEFFICIENT, INNOVATION = 0.7, 0.7, 0.3
MODELS: dict[str, tuple[Table, list[str]]] = {
    "lstm": ({"name": "lstm", "widths": [48, 48, 48]}, ["lstm2", "lstm3"]),
    "transformer": (
        {"name": "transformer", "depth": 3, "width": 32, "heads": 4},
        ["layer2", "layer3"],
    ),
}
"""Models, and their cuts into three blocks."""
METHODS: dict[str, tuple[str, str]] = {
    "backprop": ("backprop", "1f1b"),
    "local-head": ("local-head", "stream"),
}
HEADER = "load,hour_sin,hour_cos,week_sin,week_cos"


def main() -> None:
    """Train all cells and publish the record."""
    quick = parse_quick(__doc__)
    weeks, epochs, seeds = (24, 8, range(1)) if quick else (80, 10, range(3))
    bench = Bench("series_forecast", quick)
    cells: dict[str, list[float]] = {}
    naive: dict[str, list[float]] = {"day before": [], "week before": []}
    for seed in seeds:
        values = make_series(weeks * WEEK, seed)
        path = bench.folder / f"series-{seed}.csv"
        np.savetxt(path, values, delimiter=",", header=HEADER, comments="")
        for name, lag in (("day before", DAY), ("week before", WEEK)):
            naive[name].append(naive_error(values[:, 0], lag))
        for model in MODELS:
            for method in METHODS:
                cell = f"{model}-{method}-{seed}"
                run = make_run(path, model, method, seed, epochs)
                result = bench.cached(cell, partial(measure, bench, cell, run))
                cells.setdefault(f"{model} {method}", []).append(result["mae"])
    best = [min(errors) for errors in zip(*naive.values(), strict=True)]
    worst = [max(errors) for errors in zip(*cells.values(), strict=True)]
    ratios = [peer / ours for peer, ours in zip(best, worst, strict=True)]
    publish(
        "series_forecast",
        "measured",
        {cell: mean(errors) for cell, errors in cells.items()},
        {name: mean(errors) for name, errors in naive.items()},
        median(ratios),
        spread(ratios) if len(ratios) > 1 else None,
        quick=quick,
        seeds=cells,
        optimum=optimal_error(),
    )


def make_series(hours: int, seed: int) -> NDArray[np.float64]:
    """Return the series (hours, 5): the load, and sines and cosines of hour and weekday."""
    time = np.arange(hours)
    day, week = 2 * np.pi * time / DAY, 2 * np.pi * time / WEEK
    innovations = np.random.default_rng(seed).normal(0, INNOVATION, hours)
    noise = np.empty(hours)
    level = 0.0
    for hour, innovation in enumerate(innovations):
        noise[hour] = level = COEFFICIENT * level + innovation
    load = np.sin(day) + WEEKLY * np.sin(week) + noise
    return np.stack([load, np.sin(day), np.cos(day), np.sin(week), np.cos(week)], 1)


def naive_error(load: NDArray[np.float64], lag: int) -> float:
    """Return the mean absolute error of the values `lag` hours before, on the test windows; each
    forecast uses hours before its first one alone."""
    hours = len(load)
    first = hours - round(TEST * hours)
    errors = []
    for start in range(first + LENGTH, hours - HORIZON + 1):
        forecast = load[start - lag : start - lag + HORIZON]
        errors.append(np.abs(load[start : start + HORIZON] - forecast).mean())
    return float(np.mean(errors))


def optimal_error() -> float:
    """Return the expected absolute error of the best forecast, over all hours of the horizon."""
    variances = np.cumsum(INNOVATION**2 * COEFFICIENT ** (2 * np.arange(HORIZON)))
    return float(np.sqrt(variances).mean() * math.sqrt(2 / math.pi))


def measure(bench: Bench, cell: str, run: Table) -> dict[str, Any]:
    """Train one cell on three stages; return its error on the test windows."""
    summary = bench.train_in_threads(run, ["a"] * 3, f"run-{cell}").summary
    return {"mae": float(summary["metrics"]["mae"])}


def make_run(path: Path, model: str, method: str, seed: int, epochs: int) -> Table:
    """Return the run file of one cell."""
    table, cuts = MODELS[model]
    objective, schedule = METHODS[method]
    return {
        "seed": seed,
        "epochs": epochs,
        "batch-size": 64,
        "micro-batches": 4 if method == "backprop" else 1,
        "data": {
            "name": "series",
            "train": str(path),
            "test": TEST,
            "length": LENGTH,
            "horizon": HORIZON,
            "target": "load",
        },
        "task": {"loss": "l1", "metrics": ["mae"]},
        "model": table,
        "mesh": {"stages": 3},
        "partition": {"cuts": cuts},
        "objective": {"name": objective},
        "schedule": {"name": schedule},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "lr": {"name": "cosine"},
        "evaluate": {"every": epochs},
    }


if __name__ == "__main__":
    main()
