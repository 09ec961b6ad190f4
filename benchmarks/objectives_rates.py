"""Accuracy at Adam 1e-4 of the objectives that fail at 1e-3 on an MLP, over frozen inner blocks.

`ratio` = accuracy of `dfa` over that of the frozen run, the median over seeds; `spread` = its
range.

Set-up: the `mlp` cells of `objectives_cifar10` with Adam 1e-4, for the objectives below frozen
inner blocks there, and for backpropagation, Mono-Forward and frozen blocks. Three seeds, 5 epochs
of all images, accuracies only.

`figures` has the mean test accuracy (0-1), `peer` that of the frozen run. `cells` has accuracies by
seed, standard error, the paired difference to the frozen run with its standard error, and an
`order` if the difference exceeds two standard errors.

    python benchmarks/objectives_rates.py [--quick]

Label: measured. Time: starts of 35 minutes; each prints how many cells are left. `--quick`: one
seed, one epoch of 2,000 images.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from statistics import mean, median

from bench import Bench, cifar_paths, exit_if_incomplete, parse_quick, spread
from objectives_cifar10 import (
    BUDGET_S,
    SEEDS,
    Cell,
    group_by_label,
    mlp_cells,
    paired_difference,
    run_jobs,
    standard_error,
)
from record import publish

LR = 1e-4
BASE = "mlp frozen"
LABELS = (
    *("backprop", "mono-forward", "frozen", "dfa", "dni", "drtp", "f3"),
    *("forward-forward", "layer-collaboration", "pepita", "tpsgd"),
)


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = parse_quick(__doc__)
    bench, paths = Bench("objectives_rates", quick), cifar_paths()
    seeds = range(1 if quick else SEEDS)
    cells = [
        lower_rate(cell)
        for seed in seeds
        for cell in mlp_cells(paths, seed, quick)
        if cell.label.removeprefix("mlp ") in LABELS
    ]
    jobs = [(cell.name, partial(cell.measure_accuracy, bench)) for cell in cells]
    results = run_jobs(bench, jobs, 2, time.monotonic() + BUDGET_S)
    exit_if_incomplete(len(cells) - len(results))
    accuracies = {
        label: [float(results[cell.name]["test_accuracy"]) for cell in group]
        for label, group in group_by_label(cells).items()
    }
    rows = {
        label: {
            "test_accuracy": mean(values),
            "standard_error": standard_error(values),
            "seeds": values,
        }
        | paired_difference(values, accuracies[BASE])
        for label, values in accuracies.items()
    }
    ratios = [a / b for a, b in zip(accuracies["mlp dfa"], accuracies[BASE], strict=True)]
    publish(
        "objectives_rates",
        "measured",
        {label: mean(values) for label, values in accuracies.items()},
        dict.fromkeys(accuracies, mean(accuracies[BASE])),
        median(ratios),
        spread(ratios),
        quick=quick,
        lr=LR,
        cells=rows,
    )


def lower_rate(cell: Cell) -> Cell:
    """Return the cell with the lower learning rate."""
    return replace(cell, run=cell.run | {"optimizer": {"name": "adam", "lr": LR}})


if __name__ == "__main__":
    main()
