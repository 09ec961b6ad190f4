"""Accuracy of every objective on digits, over the same run with frozen inner blocks.

`ratio` = accuracy of Mono-Forward over that of backpropagation with the same seed, the median;
`spread` = its range.

Set-up: MLP 64-61-47-53 in three blocks, Adam 1e-3, batch 32, 20 epochs, every objective with its
default keys and its default schedule, seeds 0 to 2. A "frozen" run has the same run file with
``[partition] frozen = true``: random features, with the trainable parts of the objective on top
(heads, and the last block). An objective that does not exceed its frozen run has trained no useful
features in its inner blocks. Cells run two at a time with one rank and one thread each, since the
layout does not change the trained model.

`figures` has the mean test accuracy (0-1) of each objective under its name, and of its frozen run
under "NAME frozen". `peer` has those of backpropagation. `cells` has accuracies by seed, mean and
standard error; for an objective also the paired difference to its frozen run with its standard
error, and `beats`: whether the difference exceeds two standard errors.

    python benchmarks/objectives_digits.py [--quick | --table]

Label: measured. `--quick`: three objectives, two epochs, one seed. `--table` trains nothing: it
prints the table of docs/objectives.md from the record, without numbers if there is no record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from bench import Bench, spread
from record import ROOT, publish

from dtrain.objectives import OBJECTIVES
from dtrain.schema import Table

EPOCHS, SEEDS = 20, 3
QUICK = ("backprop", "mono-forward", "drtp")
RECORD = ROOT / "benchmarks" / "records" / "objectives_digits.json"
HEAD = "| objective | test accuracy, % | inner blocks frozen, % | difference | beats frozen |"
VERDICT: dict[Any, str] = {True: "yes", False: "**no**", None: "-"}

Row = dict[str, Any]
Cells = dict[tuple[str, int], float]


def main() -> None:
    """Print the table, or train all cells and publish the record."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--quick", action="store_true", help="write no record")
    modes.add_argument("--table", action="store_true", help="print the table of the docs")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(RECORD)))
        return
    names, seeds = (QUICK, range(1)) if options.quick else (tuple(OBJECTIVES), range(SEEDS))
    bench = Bench("objectives_digits", options.quick)
    cells = train_cells(bench, names, seeds, 2 if options.quick else EPOCHS)
    rows = {label: summarise_label(cells, label, seeds) for label in labels(names)}
    figures = {label: row["test_accuracy"] for label, row in rows.items()}
    peer = {label: figures[label] for label in labels(("backprop",))}
    pairs = zip(rows["mono-forward"]["seeds"], rows["backprop"]["seeds"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    publish(
        "objectives_digits",
        "measured",
        figures,
        peer,
        median(ratios),
        spread(ratios) if len(ratios) > 1 else None,
        quick=options.quick,
        cells=rows,
    )


def labels(names: tuple[str, ...]) -> Iterator[str]:
    """Yield each name, followed by the label of its frozen run."""
    for name in names:
        yield from (name, frozen_label(name))


def frozen_label(name: str) -> str:
    """Return the label of an objective's frozen run."""
    return f"{name} frozen"


def train_cells(bench: Bench, names: tuple[str, ...], seeds: range, epochs: int) -> Cells:
    """Return the test accuracy of every cell, by label and seed; two cells run at a time."""
    jobs: list[tuple[str, int, Callable[[], Row]]] = []
    for seed in seeds:
        for name in names:
            for label in labels((name,)):
                run = make_run(name, seed, epochs, label == frozen_label(name))
                cell = f"{label.replace(' ', '-')}-{seed}"
                measure = partial(measure_cell, bench, cell, run)
                jobs.append((label, seed, partial(bench.cached, cell, measure)))
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: job[2](), jobs)
        return {
            (label, seed): float(result["test_accuracy"])
            for (label, seed, _), result in zip(jobs, results, strict=True)
        }


def measure_cell(bench: Bench, cell: str, run: Table) -> Row:
    """Train one cell in its own folder; return its test accuracy."""
    summary = bench.train(run, 1, subfolder=f"run-{cell}").summary
    return {"test_accuracy": summary["test_accuracy"]}


def make_run(name: str, seed: int, epochs: int, frozen: bool) -> Table:
    """Return the run file of one cell; `frozen` freezes its inner blocks."""
    return {
        "seed": seed,
        "epochs": epochs,
        "batch-size": 32,
        "data": {"name": "digits"},
        "model": {"name": "mlp", "widths": [61, 47, 53]},
        "partition": {"blocks": 3, "frozen": frozen},
        "objective": {"name": name},
        "optimizer": {"name": "adam", "lr": 1e-3},
        "evaluate": {"every": epochs},
    }


def summarise_label(cells: Cells, label: str, seeds: range) -> Row:
    """Return mean and standard error over seeds, and the difference to the frozen run."""
    values = [cells[label, seed] for seed in seeds]
    row = {
        "test_accuracy": mean(values),
        "standard_error": standard_error(values),
        "seeds": values,
    }
    if (frozen_label(label), 0) not in cells:
        return row
    baseline = [cells[frozen_label(label), seed] for seed in seeds]
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    difference, error = mean(differences), standard_error(differences)
    beats = None if error is None else difference > 2 * error
    return row | {"difference": difference, "difference_error": error, "beats": beats}


def standard_error(values: list[float]) -> float | None:
    """Return the standard error of the mean; None for a single value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def table(record: Path) -> list[str]:
    """Return the lines of the table of the docs: means and their standard errors, in percent."""
    rows: Mapping[str, Row] = {}
    if record.exists():
        rows = json.loads(record.read_text(encoding="utf-8"))["cells"]
    lines = [HEAD, "|---|---|---|---|---|"]
    for name in rows or OBJECTIVES:
        if name.endswith(" frozen"):
            continue
        trained, frozen = rows.get(name, {}), rows.get(frozen_label(name), {})
        cells = [
            f"`{name}`",
            _percent(trained, "test_accuracy", "standard_error"),
            _percent(frozen, "test_accuracy", "standard_error"),
            _percent(trained, "difference", "difference_error", "+"),
            VERDICT[trained.get("beats")],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(row: Row, key: str, error_key: str, sign: str = "") -> str:
    """Return a mean and its standard error in percent, or a dash if there is none."""
    if row.get(error_key) is None:
        return "-"
    return f"{100 * row[key]:{sign}.1f} ± {100 * row[error_key]:.1f}"


if __name__ == "__main__":
    main()
