"""Accuracy and compute of the objectives without messages, over random features and backprop.

`ratio` = accuracy of `noprop`, 16 chains, on CIFAR-10 over that of CaFo, random features with
solved heads, with the same seed, the median; `spread` = its range.

Set-up, three seeds each (one for "x 3 epochs" on CIFAR-10):

* `digits`: MLP 64-64-64-64 in three blocks, Adam 1e-3, batch 32, 20 epochs.
* `cifar10`: MLP 3072-1000-1000-1000 in three blocks, Adam 1e-3, batch 128, 5 epochs of all images.

`noprop` and `diffusion-blocks` read the sample in every block by a copy of the net's first layer,
so they have more parameters and multiply-adds than the same net under backpropagation: see
`train_multiply_adds`. "x 3 epochs" is the paper's rule for DiffusionBlocks, as many times the
epochs as there are blocks. "16 chains" is another prediction of the same weights: the mean over
16 chains, where one chain draws a sample of the classes. Baselines: `backprop` on the same net,
`frozen` (random features with trained linear heads; the last block is trained) and `cafo` (all
blocks are random, heads are solved).

`figures` has the mean test accuracy (0-1) of every cell, `peer` that of backpropagation. `cells`
has accuracies by seed, mean, standard error, the paired differences to backpropagation and to CaFo
with their standard errors and an `order` if a difference exceeds two of them; and the compute of
one sample: `train_forwards` and `predict_forwards`, passes through each block;
`train_multiply_adds`, forward and backward, in one epoch; `train_compute`, the multiply-adds of the
whole training over those of backpropagation. `bytes` are counted on three ranks, between blocks.

    python benchmarks/objectives_denoising.py [--quick]

Label: measured. Time: starts of 35 minutes; each prints how many cells are left. `--quick`: one
seed, 2 epochs of digits, one of 2,000 images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from statistics import mean, median
from typing import Any, final

from bench import (
    DTRAIN,
    Bench,
    cifar_paths,
    exit_if_incomplete,
    parse_quick,
    run_program,
    spread,
)
from objectives_cifar10 import (
    BUDGET_S,
    SEEDS,
    paired_difference,
    run_jobs,
    standard_error,
)
from record import publish

from dtrain.config.parse import parse_run
from dtrain.planning.plan import make_plan
from dtrain.schema import Table

BLOCKS, CHAINS, FLOW_STEPS = 3, 16, 10
FORM: Table = {"name": "noprop", "form": "flow"}
SQUARES: Table = {"name": "diffusion-blocks", "loss": "squared-error"}
CELLS: dict[str, tuple[Table, int, bool]] = {
    # label: objective, factor of the epochs, whether inner blocks are frozen
    "backprop": ({"name": "backprop"}, 1, False),
    "frozen": ({"name": "mono-forward"}, 1, True),
    "cafo": ({"name": "cafo"}, 1, False),
    "noprop": ({"name": "noprop"}, 1, False),
    "noprop flow": (FORM, 1, False),
    "diffusion-blocks": ({"name": "diffusion-blocks"}, 1, False),
    "diffusion-blocks squared-error": (SQUARES, 1, False),
    f"diffusion-blocks squared-error x {BLOCKS} epochs": (SQUARES, BLOCKS, False),
}
PREDICTIONS: dict[str, tuple[str, dict[str, int]]] = {
    # label: label of the trained weights, fields of the objective in prediction
    f"noprop {CHAINS} chains": ("noprop", {"chains": CHAINS}),
    f"noprop flow {FLOW_STEPS} steps": ("noprop flow", {"steps": FLOW_STEPS}),
    f"noprop flow {CHAINS} chains": ("noprop flow", {"chains": CHAINS}),
    f"diffusion-blocks {CHAINS} chains": ("diffusion-blocks", {"chains": CHAINS}),
    f"diffusion-blocks squared-error {CHAINS} chains": (
        "diffusion-blocks squared-error",
        {"chains": CHAINS},
    ),
}
DIGITS: Table = {
    "epochs": 20,
    "batch-size": 32,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [64, 64, 64]},
}

Row = dict[str, Any]


@final
@dataclass(frozen=True)
class Cell:
    """One run file, the data set and the method, a key of `CELLS`."""

    data: str
    method: str
    seed: int
    run: Table

    @property
    def name(self) -> str:
        """The name of its cached results."""
        return f"{self.data} {self.method} {self.seed}".replace(" ", "-")

    def measure(self, bench: Bench) -> Row:
        """Train to the end on one rank."""
        summary = bench.train(self.run, 1, subfolder=self.name).summary
        return {"test_accuracy": summary["test_accuracy"]}

    def evaluate(self, bench: Bench, fields: dict[str, int]) -> Row:
        """Evaluate the trained weights with other fields in prediction."""
        command = [*DTRAIN, "evaluate", "out", "--json"]
        for key, value in fields.items():
            command += ["--set", f"objective.{key}={value}"]
        output = run_program(command, bench.folder / self.name, 1, capture=True)
        return {"test_accuracy": json.loads(output)["accuracy"]}

    def measure_bytes(self, bench: Bench) -> Row:
        """Train three updates on three ranks; return the bytes that were sent for a sample."""
        short = {key: value for key, value in self.run.items() if key != "epochs"}
        run = short | {"updates": BLOCKS, "mesh": {"stages": BLOCKS}}
        summary = bench.train(run, BLOCKS, subfolder=f"bytes-{self.name}").summary
        sent = summary["bytes_intra_node"] + summary["bytes_inter_node"]
        return {"bytes": sent / summary["samples"]}

    def multiply_adds(self, bench: Bench) -> int:
        """Return those of a sample in training, forward and backward, in all blocks."""
        plan = make_plan(parse_run(self.run, bench.folder), 1)
        return sum(block.cost for block in plan.layout.block_layouts)


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = parse_quick(__doc__)
    bench, paths = Bench("objectives_denoising", quick), cifar_paths()
    seeds = range(1 if quick else SEEDS)
    cells = [
        *(cell for seed in seeds for cell in make_cells("digits", digits(quick), seed)),
        *(
            cell
            for seed in seeds
            for cell in make_cells("cifar10", cifar10(paths, quick), seed)
            if seed == 0 or CELLS[cell.method][1] == 1
        ),
    ]
    first = [cell for cell in cells if cell.seed == 0]
    jobs = [(cell.name, partial(cell.measure, bench)) for cell in cells]
    jobs += [(f"bytes-{cell.name}", partial(cell.measure_bytes, bench)) for cell in first]
    others = [
        (f"{cell.name} {label}", partial(cell.evaluate, bench, fields))
        for cell in cells
        for label, (method, fields) in PREDICTIONS.items()
        if method == cell.method
    ]
    until = time.monotonic() + BUDGET_S
    results = run_jobs(bench, jobs, 2, until)
    if len(results) == len(jobs):
        results |= run_jobs(bench, others, 2, until)
    exit_if_incomplete(len(jobs) + len(others) - len(results))
    rows = {
        f"{cell.data} {label}": summarise(cell, label, results, bench)
        for cell in first
        for label in predictions(cell.method)
    }
    for label, row in rows.items():
        add_comparisons(rows, label, row)
    names = f"noprop {CHAINS} chains", "cafo"
    ours, random = (rows[f"cifar10 {name}"]["seeds"] for name in names)
    ratios = [a / b for a, b in zip(ours, random, strict=True)]
    publish(
        "objectives_denoising",
        "measured",
        {label: row["test_accuracy"] for label, row in rows.items()},
        {label: rows[base_label(label, "backprop")]["test_accuracy"] for label in rows},
        median(ratios),
        spread(ratios) if len(ratios) > 1 else None,
        quick=quick,
        cells=rows,
    )


def digits(quick: bool) -> Table:
    """Return the keys of the run files of digits that all cells share."""
    return DIGITS | ({"epochs": 2} if quick else {})


def cifar10(paths: tuple[str, str], quick: bool) -> Table:
    """Return the keys of the run files of CIFAR-10 that all cells share."""
    train, test = paths
    data: Table = {"name": "hdf5", "train": train, "test": test}
    if quick:
        data = {"name": "user:subset", "train": train, "test": test, "rows": 2000, "tests": 500}
    return {
        "epochs": 1 if quick else 5,
        "batch-size": 128,
        "data": data,
        "model": {"name": "mlp", "widths": [1000, 1000, 1000]},
    }


def make_cells(name: str, shared: Table, seed: int) -> Iterator[Cell]:
    """Yield the cells of one data set and seed."""
    for method, (objective, factor, frozen) in CELLS.items():
        epochs = factor * int(shared["epochs"])
        run: Table = shared | {
            "seed": seed,
            "epochs": epochs,
            "partition": {"cuts": [1, 2], "frozen": frozen},
            "objective": objective,
            "optimizer": {"name": "adam", "lr": 1e-3},
            "evaluate": {"every": epochs},
        }
        yield Cell(name, method, seed, run)


def predictions(method: str) -> dict[str, int]:
    """Return the passes of a sample through each block, by label of the weights of a method."""
    others = {
        label: prod(fields.values())
        for label, (trained, fields) in PREDICTIONS.items()
        if trained == method
    }
    return {method: 1} | others


def summarise(cell: Cell, label: str, results: dict[str, Row], bench: Bench) -> Row:
    """Return mean and standard error of one prediction over the seeds, and its compute."""
    names = [replace(cell, seed=seed).name for seed in range(SEEDS)]
    if label != cell.method:
        names = [f"{name} {label}" for name in names]
    values = [float(results[name]["test_accuracy"]) for name in names if name in results]
    return {
        "test_accuracy": mean(values),
        "standard_error": standard_error(values),
        "seeds": values,
        "train_forwards": 1,
        "predict_forwards": predictions(cell.method)[label],
        "train_multiply_adds": cell.multiply_adds(bench),
        "epochs": cell.run["epochs"],
        "bytes": results[f"bytes-{cell.name}"]["bytes"],
    }


def add_comparisons(rows: dict[str, Row], label: str, row: Row) -> None:
    """Add the differences of a row to backpropagation and CaFo, and its relative compute."""
    backprop = rows[base_label(label, "backprop")]
    row["train_compute"] = (
        row["train_multiply_adds"]
        * row["epochs"]
        / (backprop["train_multiply_adds"] * backprop["epochs"])
    )
    for name in ("backprop", "cafo"):
        base = rows[base_label(label, name)]["seeds"][: len(row["seeds"])]
        row[f"beside_{name}"] = paired_difference(row["seeds"], base)


def base_label(label: str, name: str) -> str:
    """Return the label of a baseline on the same data."""
    return f"{label.partition(' ')[0]} {name}"


if __name__ == "__main__":
    main()
