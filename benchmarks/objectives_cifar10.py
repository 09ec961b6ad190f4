"""Accuracy of every objective on CIFAR-10, over backpropagation of the same net.

`ratio` = accuracy of Mono-Forward over that of backpropagation on the MLP with the same seed, the
median over seeds; `spread` = its range.

Set-up, three seeds each:

* `mlp`: 3072-1000-1000-1000, three blocks, Adam 1e-3, batch 128, 5 epochs of all 50,000 images,
  every objective with its default keys.
* `resnet`: ResNet-32 with BatchNorm, cut after equal numbers of residual units (K = 2: eight of the
  16 layers below the head; K = 8: two), SGD with Nesterov momentum 0.9 and weight decay 1e-4,
  learning rate 0.05 along a cosine, batch 128, 4 epochs of 5,000 images, 2,000 test images.

Baselines of both: `backprop`; `deep-supervision`, which is backpropagation with the same heads; and
`frozen`, random features with linear heads. Accuracy cells run two at a time with one rank and one
thread each, since the layout does not change the trained model. Speed, memory and bytes are
measured once per objective, alone, on two ranks, after a warm-up.

`figures` has the mean test accuracy (0-1) of every cell, `peer` that of backpropagation. `cells`
has accuracies by seed, mean, standard error, the paired difference to backpropagation (same seeds)
with its standard error, and an `order` if the difference exceeds two standard errors.

    python benchmarks/objectives_cifar10.py [--quick]

Label: measured. Time: starts of 35 minutes; each prints how many cells are left, and the start that
finishes the last cell writes the record. `--quick`: one seed, the MLP alone, one epoch of 2,000
images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import sqrt
from statistics import mean, median, stdev
from typing import Any, final

from bench import Bench, RunResult, cifar_paths, exit_if_incomplete, parse_quick, spread
from record import publish

from dtrain.schema import Table

BUDGET_S = 35 * 60
SEEDS = 3
FROZEN: Table = {"partition": {"frozen": True}}

MLP: dict[str, tuple[Table, Table]] = {
    # label: objective, further sections of its run file
    "backprop": ({"name": "backprop"}, {}),
    "deep-supervision": ({"name": "deep-supervision"}, {}),
    "frozen": ({"name": "mono-forward"}, FROZEN),
    "mono-forward": ({"name": "mono-forward"}, {}),
    "local-head greedy": ({"name": "local-head"}, {}),
    "local-head dgl": ({"name": "local-head", "head": "dgl"}, {}),
    "local-head auglocal": ({"name": "local-head", "head": "auglocal"}, {}),
    "infopro": ({"name": "infopro"}, {}),
    "man": ({"name": "man"}, {}),
    "lls": ({"name": "lls"}, {}),
    "lls-m": ({"name": "lls-m"}, {}),
    "lls-mxm": ({"name": "lls-mxm"}, {}),
    "drtp": ({"name": "drtp"}, {}),
    "tpsgd": ({"name": "tpsgd"}, {}),
    "f3": ({"name": "f3"}, {}),
    "dfa": ({"name": "dfa"}, {}),
    "pepita": ({"name": "pepita"}, {}),
    "ccl": ({"name": "ccl"}, {}),
    "dni": ({"name": "dni"}, {}),
    "cafo": ({"name": "cafo"}, {}),
    "forward-forward": ({"name": "forward-forward"}, {}),
    "layer-collaboration": ({"name": "layer-collaboration"}, {}),
    "scalable-ff": ({"name": "scalable-ff"}, {}),
}
RESNET: dict[str, tuple[Table, Table]] = {
    "backprop": ({"name": "backprop"}, {}),
    "deep-supervision": ({"name": "deep-supervision", "head": "dgl"}, {}),
    "frozen": ({"name": "local-head"}, FROZEN),
    "greedy": ({"name": "local-head"}, {}),
    "dgl": ({"name": "local-head", "head": "dgl"}, {}),
    "infopro ce": ({"name": "infopro"}, {}),
    "auglocal": ({"name": "local-head", "head": "auglocal"}, {}),
    "man": ({"name": "man"}, {}),
}
CUTS = {2: [8], 8: [2, 4, 6, 8, 10, 12, 14]}
"""Layers of ResNet-32 at which blocks start; its layers are a stem, 15 units and a head."""

Row = dict[str, Any]


@final
@dataclass(frozen=True)
class Cell:
    """One run file, the name of its cached results and its label in the record."""

    name: str
    label: str
    run: Table

    def measure_accuracy(self, bench: Bench) -> Row:
        """Train to the end on one rank."""
        result = bench.train(self.run, 1, subfolder=self.name)
        final = {key: result.summary[key] for key in ("test_accuracy", "test_accuracy_vote")}
        return final | {"per_block": result.summary["accuracy_per_block"]}

    def measure_speed(self, bench: Bench) -> Row:
        """Train three short segments on two ranks; the first warms up."""
        short = {key: value for key, value in self.run.items() if key != "epochs"}
        result = bench.train(short | {"updates": 45, "segment": 15}, 2, subfolder=self.name)
        return {
            "samples_per_s": result.samples_per_s(),
            "peak_memory_bytes": result.summary["peak_memory_bytes"],
            "bytes_per_sample": _bytes_sent(result) / result.summary["samples"],
            "staleness": result.summary["staleness"],
        }


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = parse_quick(__doc__)
    bench, paths = Bench("objectives_cifar10", quick), cifar_paths()
    seeds = range(1 if quick else SEEDS)
    cells = [cell for seed in seeds for cell in mlp_cells(paths, seed, quick)]
    if not quick:
        cells += [cell for seed in seeds for cell in resnet_cells(paths, seed)]
    speeds = [cell for cell in cells if cell.name.endswith("-0")]
    until = time.monotonic() + BUDGET_S
    jobs = [(cell.name, partial(cell.measure_accuracy, bench)) for cell in cells]
    results = run_jobs(bench, jobs, 2, until)
    # Speeds are measured alone, after all accuracy cells.
    if len(results) == len(cells):
        jobs = [(f"speed-{cell.name}", partial(cell.measure_speed, bench)) for cell in speeds]
        results |= run_jobs(bench, jobs, 1, until)
    exit_if_incomplete(len(cells) + len(speeds) - len(results))
    rows = {
        label: _summarise_label(group, results) for label, group in group_by_label(cells).items()
    }
    _add_differences(rows)
    figures = {label: row["test_accuracy"] for label, row in rows.items()}
    peer = {label: rows[_baseline(label)]["test_accuracy"] for label in rows}
    pairs = zip(rows["mlp mono-forward"]["seeds"], rows["mlp backprop"]["seeds"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    publish(
        "objectives_cifar10", "measured", figures, peer, median(ratios), spread(ratios),
        quick=quick, cells=rows,
    )  # fmt: skip


def mlp_cells(paths: tuple[str, str], seed: int, quick: bool) -> Iterator[Cell]:
    """Yield the MLP cells of one seed."""
    train, test = paths
    data: Table = {"name": "hdf5", "train": train, "test": test}
    if quick:
        data = {"name": "user:subset", "train": train, "test": test, "rows": 2000, "tests": 500}
    for label, (objective, sections) in MLP.items():
        base: Table = {
            "seed": seed,
            "epochs": 1 if quick else 5,
            "data": data,
            "model": {"name": "mlp", "widths": [1000, 1000, 1000]},
            "partition": {"cuts": [1, 2]} | sections.get("partition", {}),
            "objective": objective,
            "optimizer": {"name": "adam", "lr": 1e-3},
            "evaluate": {"every": 5},
        }
        yield Cell(f"mlp-{label.replace(' ', '-')}-{seed}", f"mlp {label}", base)


def resnet_cells(paths: tuple[str, str], seed: int) -> Iterator[Cell]:
    """Yield the ResNet-32 cells of one seed, in 2 and in 8 blocks."""
    train, test = paths
    files = {"train": train, "test": test, "rows": 5000, "tests": 2000}
    for blocks, cuts in CUTS.items():
        for label, (objective, sections) in RESNET.items():
            if label == "backprop" and blocks == 8:
                continue  # equal to 2 blocks: the same net and gradient
            base: Table = {
                "seed": seed,
                "epochs": 4,
                "data": {"name": "user:subset", **files},
                "model": {"name": "resnet", "depth": 32},
                "partition": {"cuts": cuts} | sections.get("partition", {}),
                "objective": objective,
                "optimizer": {
                    "name": "sgd",
                    "lr": 0.05,
                    "momentum": 0.9,
                    "nesterov": True,
                    "weight-decay": 1e-4,
                },
                "lr": {"name": "cosine"},
                "evaluate": {"every": 4},
            }
            name = f"resnet-k{blocks}-{label.replace(' ', '-')}-{seed}"
            yield Cell(name, f"resnet k{blocks} {label}", base)


def run_jobs(
    bench: Bench, jobs: Sequence[tuple[str, Callable[[], Row]]], workers: int, until: float
) -> dict[str, Row]:
    """Return the rows of all jobs that are cached or start before `until`, by name."""

    def run_job(job: tuple[str, Callable[[], Row]]) -> tuple[str, Row] | None:
        name, measure = job
        late = time.monotonic() > until
        return None if late and not bench.has(name) else (name, bench.cached(name, measure))

    with ThreadPoolExecutor(workers) as pool:
        return dict(filter(None, pool.map(run_job, jobs)))


def _bytes_sent(result: RunResult) -> int:
    return int(result.summary["bytes_intra_node"] + result.summary["bytes_inter_node"])


def group_by_label(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of each label, seed by seed."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.label, []).append(cell)
    return groups


def _summarise_label(cells: list[Cell], results: Mapping[str, Row]) -> Row:
    """Return means over the seeds of one label, and its speed."""
    seeds = [results[cell.name]["test_accuracy"] for cell in cells]
    votes = [results[cell.name]["test_accuracy_vote"] for cell in cells]
    return {
        "test_accuracy": mean(seeds),
        "standard_error": standard_error(seeds),
        "seeds": seeds,
        "vote": mean(votes),
        **results[f"speed-{cells[0].name}"],
    }


def _baseline(label: str) -> str:
    """Return the label of backpropagation on the same net."""
    return "mlp backprop" if label.startswith("mlp") else "resnet k2 backprop"


def _add_differences(rows: Mapping[str, Row]) -> None:
    """Add the paired difference to backpropagation to each row."""
    for label, row in rows.items():
        row |= paired_difference(row["seeds"], rows[_baseline(label)]["seeds"])


def paired_difference(values: Sequence[float], base: Sequence[float]) -> Row:
    """Return the mean difference, its standard error, and its sign if beyond two of them."""
    differences = [value - other for value, other in zip(values, base, strict=True)]
    difference, error = mean(differences), standard_error(differences)
    significant = error is not None and abs(difference) > 2 * error
    order = ("above" if difference > 0 else "below") if significant else None
    return {"difference": difference, "difference_error": error, "order": order}


def standard_error(values: list[float]) -> float | None:
    """Return the standard error of the mean; None for a single value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


if __name__ == "__main__":
    main()
