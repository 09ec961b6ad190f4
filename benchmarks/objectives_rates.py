"""What a lower learning rate makes of objectives that Adam 1e-3 leaves behind: the perceptron.

Measured: the cells `mlp` of `objectives_cifar10` once more with Adam 1e-4, for the objectives that
stay below frozen inner blocks there, beside backpropagation, Mono-Forward and frozen blocks at the
same rate. Three seeds, 5 epochs of all images, accuracies only.

`figures` has the mean test accuracy (0-1) at 1e-4, `peer` the frozen run's. `ratio` = accuracy of
`dfa` over the frozen run's, the median over seeds; `spread` = its range. `cells` has the seeds, the
standard error, and the paired difference to the frozen run with its own and, beyond two of them, an
`order`.

    python benchmarks/objectives_rates.py [--quick]

Cells are kept: a start works for 35 minutes, then says how many are left. `--quick`: one seed, one
epoch of 2,000 images.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from statistics import mean, median

from bench import Bench, asked, cifar, complete
from objectives_cifar10 import BUDGET_S, SEEDS, Cell, difference, error, grouped, mlp, trained
from record import publish

LR = 1e-4
BASE = "mlp frozen"
LABELS = (
    *("backprop", "mono-forward", "frozen", "dfa", "dni", "drtp", "f3"),
    *("forward-forward", "layer-collaboration", "pepita", "tpsgd"),
)


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = asked(__doc__)
    bench, paths = Bench("objectives_rates", quick), cifar()
    seeds = range(1 if quick else SEEDS)
    cells = [slower(cell) for seed in seeds for cell in mlp(paths, seed, quick) if chosen(cell)]
    jobs = [(cell.name, partial(cell.accuracy, bench)) for cell in cells]
    told = trained(bench, jobs, 2, time.monotonic() + BUDGET_S)
    complete(len(cells) - len(told))
    accuracies = {
        label: [float(told[cell.name]["test_accuracy"]) for cell in own]
        for label, own in grouped(cells).items()
    }
    rows = {
        label: {"test_accuracy": mean(own), "standard_error": error(own), "seeds": own}
        | difference(own, accuracies[BASE])
        for label, own in accuracies.items()
    }
    ratios = [a / b for a, b in zip(accuracies["mlp dfa"], accuracies[BASE], strict=True)]
    publish(
        "objectives_rates",
        "measured",
        {label: mean(own) for label, own in accuracies.items()},
        dict.fromkeys(accuracies, mean(accuracies[BASE])),
        median(ratios),
        max(ratios) - min(ratios),
        quick=quick,
        lr=LR,
        cells=rows,
    )


def chosen(cell: Cell) -> bool:
    """Say whether a cell is of an objective that is looked at again."""
    return cell.label.removeprefix("mlp ") in LABELS


def slower(cell: Cell) -> Cell:
    """Return a cell at the lower rate."""
    return replace(cell, run=cell.run | {"optimizer": {"name": "adam", "lr": LR}})


if __name__ == "__main__":
    main()
