"""Every objective on digits, each beside the same run whose inner blocks are frozen: accuracy.

MLP 64-61-47-53 in three blocks, Adam 1e-3, batch 32, 20 epochs, every objective with its default
fields and its default schedule, seeds 0 to 2. "frozen" is the same run file with ``[partition]
frozen = true``: random features, read by what the objective has left (heads, and the last block).
An objective that does not beat that has taught its inner blocks nothing that the last one can use.

`figures` has the mean test accuracy (0-1) of each objective under its name, and of its frozen run
under "NAME frozen". `peer` has those of backpropagation. `ratio` = accuracy of Mono-Forward over
backpropagation's with the same seed, the median; `spread` = its range. `cells` has the accuracies
seed by seed, their mean and its standard error; for an objective also the paired difference to its
frozen run with its standard error, and `beats`: whether that is above 0 by more than two of them.

No figure is a time, so cells run two at a time, each on one rank with one thread: no layout changes
what is learnt, so two stages end in the same bits.

    python benchmarks/objectives_digits.py [--quick | --table]

`--quick`: three objectives, two epochs, one seed. `--table` trains nothing: it prints the table of
docs/objectives.md from the record, without numbers where there is no record yet.
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
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quick", action="store_true", help="writes no record")
    only.add_argument("--table", action="store_true", help="prints the table of the docs")
    asked = parser.parse_args()
    if asked.table:
        print("\n".join(table(RECORD)))
        return
    names, seeds = (QUICK, range(1)) if asked.quick else (tuple(OBJECTIVES), range(SEEDS))
    bench = Bench("objectives_digits", asked.quick)
    cells = trained(bench, names, seeds, 2 if asked.quick else EPOCHS)
    rows = {label: row(cells, label, seeds) for label in labels(names)}
    figures = {label: each["test_accuracy"] for label, each in rows.items()}
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
        quick=asked.quick,
        cells=rows,
    )


def labels(names: tuple[str, ...]) -> Iterator[str]:
    """Yield each name, and that of its frozen run behind it."""
    for name in names:
        yield from (name, frozen(name))


def frozen(name: str) -> str:
    """Return the label of an objective's frozen run."""
    return f"{name} frozen"


def trained(bench: Bench, names: tuple[str, ...], seeds: range, epochs: int) -> Cells:
    """Return the test accuracy of every cell, by label and seed; two are trained at a time."""
    jobs: list[tuple[str, int, Callable[[], Row]]] = []
    for seed in seeds:
        for name in names:
            for label in labels((name,)):
                run = digits(name, seed, epochs, label == frozen(name))
                stem = f"{label.replace(' ', '-')}-{seed}"
                jobs.append((label, seed, partial(bench.kept, stem, _cell(bench, stem, run))))
    with ThreadPoolExecutor(2) as pool:
        told = pool.map(lambda job: job[2](), jobs)
        return {
            (label, seed): float(each["test_accuracy"])
            for (label, seed, _), each in zip(jobs, told, strict=True)
        }


def _cell(bench: Bench, stem: str, run: Table) -> Callable[[], Row]:
    """Return what trains one cell, in a folder of its own, and tells its accuracy."""
    return lambda: {
        "test_accuracy": bench.train(run, 1, where=f"run-{stem}").summary["test_accuracy"]
    }


def digits(name: str, seed: int, epochs: int, held: bool) -> Table:
    """Return the run file of one cell; `held`: its inner blocks are frozen."""
    return {
        "seed": seed,
        "epochs": epochs,
        "batch-size": 32,
        "data": {"name": "digits"},
        "model": {"name": "mlp", "widths": [61, 47, 53]},
        "partition": {"blocks": 3, "frozen": held},
        "objective": {"name": name},
        "optimizer": {"name": "adam", "lr": 1e-3},
        "evaluate": {"every": epochs},
    }


def row(cells: Cells, label: str, seeds: range) -> Row:
    """Return what the cells of one label tell together."""
    own = [cells[label, seed] for seed in seeds]
    told = {"test_accuracy": mean(own), "standard_error": error(own), "seeds": own}
    if (frozen(label), 0) not in cells:
        return told
    gaps = [ours - cells[frozen(label), seed] for seed, ours in zip(seeds, own, strict=True)]
    gap, doubt = mean(gaps), error(gaps)
    beats = None if doubt is None else gap > 2 * doubt
    return told | {"difference": gap, "difference_error": doubt, "beats": beats}


def error(values: list[float]) -> float | None:
    """Return the standard error of a mean, None of one value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def table(record: Path) -> list[str]:
    """Return the lines of the table of the docs: means and their standard errors, in percent."""
    told: Mapping[str, Row] = {}
    if record.exists():
        told = json.loads(record.read_text(encoding="utf-8"))["cells"]
    lines = [HEAD, "|---|---|---|---|---|"]
    for name in told or OBJECTIVES:
        if name.endswith(" frozen"):
            continue
        own, other = told.get(name, {}), told.get(frozen(name), {})
        cells = [
            f"`{name}`",
            _percent(own, "test_accuracy", "standard_error"),
            _percent(other, "test_accuracy", "standard_error"),
            _percent(own, "difference", "difference_error", "+"),
            VERDICT[own.get("beats")],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(told: Row, key: str, doubt: str, sign: str = "") -> str:
    """Return a mean and its standard error in percent, or a dash where there is none."""
    if told.get(doubt) is None:
        return "-"
    return f"{100 * told[key]:{sign}.1f} ± {100 * told[doubt]:.1f}"


if __name__ == "__main__":
    main()
