"""All objectives side by side on CIFAR-10: an MLP in three blocks, and a ResNet-32 in 2 and in 8.

Measured, in cells that are kept: a start trains what is missing for 35 minutes, then says how many
cells are left; the record is written by the start that finds none. Two parts:

* `mlp`: 3072-1000-1000-1000, three blocks, Adam 1e-3, batch 128, 5 epochs, all 50,000 images, three
  seeds, every objective with its default fields.
* `resnet`: ResNet-32 with BatchNorm, cut after equal numbers of residual units (K = 2: eight of the
  16 layers below the head; K = 8: two), SGD with Nesterov momentum 0.9 and weight decay 1e-4,
  learning rate 0.05 along a cosine, batch 128, 4 epochs of 5,000 images, 2,000 test images, seeds.

Baselines in both: `backprop`; `deep-supervision`, which is backpropagation with the same heads; and
`frozen`, random features with linear heads. Accuracy cells run two at a time, one rank and one
thread each: no layout changes what is learnt. Speed, memory and bytes are measured once per
objective, alone, on two ranks, over updates that follow a warm-up.

`figures` has the mean test accuracy (0-1) of every cell. `peer` has backpropagation's. `ratio` =
accuracy of Mono-Forward over backpropagation's on the MLP, the median over seeds; `spread` = its
range. `cells` tells all: accuracies per seed, mean, standard error, the paired difference to
backpropagation (the same seeds) with its standard error and, beyond two of them, an `order`.

    python benchmarks/objectives_cifar10.py [--quick]

`--quick`: one seed, the MLP alone, 2,000 images, one epoch.
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

from bench import Bench, Told, asked, cifar, complete
from record import publish

from dtrain.schema import Table

BUDGET_S = 35 * 60
SEEDS = 3
FROZEN: Table = {"partition": {"frozen": True}}

MLP: dict[str, tuple[Table, Table]] = {
    # label: objective, what else its run file says
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
"""Layers of ResNet-32 at which blocks start: stem, 15 units, head."""

Row = dict[str, Any]


@final
@dataclass(frozen=True)
class Cell:
    """One run: what is trained, and under which name it is kept."""

    name: str
    label: str
    run: Table

    def accuracy(self, bench: Bench) -> Row:
        """Train to the end on one rank."""
        told = bench.train(self.run, 1, where=self.name)
        final = {key: told.summary[key] for key in ("test_accuracy", "test_accuracy_vote")}
        return final | {"per_block": told.summary["accuracy_per_block"]}

    def speed(self, bench: Bench) -> Row:
        """Train three short segments on two ranks; the first warms up."""
        short = {key: value for key, value in self.run.items() if key != "epochs"}
        told = bench.train(short | {"updates": 45, "segment": 15}, 2, where=self.name)
        return {
            "samples_per_s": told.rate(),
            "peak_memory_bytes": told.summary["peak_memory_bytes"],
            "bytes_per_sample": _sent(told) / told.summary["samples"],
            "staleness": told.summary["staleness"],
        }


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = asked(__doc__)
    bench, paths = Bench("objectives_cifar10", quick), cifar()
    seeds = range(1 if quick else SEEDS)
    cells = [cell for seed in seeds for cell in mlp(paths, seed, quick)]
    if not quick:
        cells += [cell for seed in seeds for cell in resnet(paths, seed)]
    speeds = [cell for cell in cells if cell.name.endswith("-0")]
    until = time.monotonic() + BUDGET_S
    told = trained(bench, [(cell.name, partial(cell.accuracy, bench)) for cell in cells], 2, until)
    # Only what is measured runs: the accuracy cells are all there before a speed is taken.
    if len(told) == len(cells):
        jobs = [(f"speed-{cell.name}", partial(cell.speed, bench)) for cell in speeds]
        told |= trained(bench, jobs, 1, until)
    left = len(cells) + len(speeds) - len(told)
    complete(left)
    rows = {label: _row(own, told) for label, own in grouped(cells).items()}
    _compare(rows)
    figures = {label: row["test_accuracy"] for label, row in rows.items()}
    peer = {label: rows[_baseline(label)]["test_accuracy"] for label in rows}
    pairs = zip(rows["mlp mono-forward"]["seeds"], rows["mlp backprop"]["seeds"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    ratio, spread = median(ratios), max(ratios) - min(ratios)
    publish("objectives_cifar10", "measured", figures, peer, ratio, spread, quick=quick, cells=rows)


def mlp(paths: tuple[str, str], seed: int, quick: bool) -> Iterator[Cell]:
    """Yield one seed's cells of the perceptron."""
    train, test = paths
    data: Table = {"name": "hdf5", "train": train, "test": test}
    if quick:
        data = {"name": "user:subset", "train": train, "test": test, "rows": 2000, "tests": 500}
    for label, (objective, more) in MLP.items():
        base: Table = {
            "seed": seed,
            "epochs": 1 if quick else 5,
            "data": data,
            "model": {"name": "mlp", "widths": [1000, 1000, 1000]},
            "partition": {"cuts": [1, 2]} | more.get("partition", {}),
            "objective": objective,
            "optimizer": {"name": "adam", "lr": 1e-3},
            "evaluate": {"every": 5},
        }
        yield Cell(f"mlp-{label.replace(' ', '-')}-{seed}", f"mlp {label}", base)


def resnet(paths: tuple[str, str], seed: int) -> Iterator[Cell]:
    """Yield one seed's cells of the residual network, in 2 and in 8 blocks."""
    train, test = paths
    files = {"train": train, "test": test, "rows": 5000, "tests": 2000}
    for blocks, cuts in CUTS.items():
        for label, (objective, more) in RESNET.items():
            if label == "backprop" and blocks == 8:
                continue  # the same net, the same gradient
            base: Table = {
                "seed": seed,
                "epochs": 4,
                "data": {"name": "user:subset", **files},
                "model": {"name": "resnet", "depth": 32},
                "partition": {"cuts": cuts} | more.get("partition", {}),
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
            stem = f"resnet-k{blocks}-{label.replace(' ', '-')}-{seed}"
            yield Cell(stem, f"resnet k{blocks} {label}", base)


def trained(
    bench: Bench, jobs: Sequence[tuple[str, Callable[[], Row]]], beside: int, until: float
) -> dict[str, Row]:
    """Return what the jobs returned, some beside each other; none starts after `until`."""

    def one(job: tuple[str, Callable[[], Row]]) -> tuple[str, Row] | None:
        name, make = job
        late = time.monotonic() > until
        return None if late and not bench.has(name) else (name, bench.kept(name, make))

    with ThreadPoolExecutor(beside) as pool:
        return dict(filter(None, pool.map(one, jobs)))


def _sent(told: Told) -> int:
    return int(told.summary["bytes_intra_node"] + told.summary["bytes_inter_node"])


def grouped(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of each label, seed by seed."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.label, []).append(cell)
    return groups


def _row(own: list[Cell], told: Mapping[str, Row]) -> Row:
    """Return what one label's cells tell together."""
    seeds = [told[cell.name]["test_accuracy"] for cell in own]
    votes = [told[cell.name]["test_accuracy_vote"] for cell in own]
    return {
        "test_accuracy": mean(seeds),
        "standard_error": error(seeds),
        "seeds": seeds,
        "vote": mean(votes),
        **told[f"speed-{own[0].name}"],
    }


def _baseline(label: str) -> str:
    """Return the label of backpropagation on the same net."""
    return "mlp backprop" if label.startswith("mlp") else "resnet k2 backprop"


def _compare(rows: Mapping[str, Row]) -> None:
    """Add the paired difference to backpropagation, and an order where it is beyond doubt."""
    for label, row in rows.items():
        row |= difference(row["seeds"], rows[_baseline(label)]["seeds"])


def difference(own: Sequence[float], base: Sequence[float]) -> Row:
    """Return the mean difference of pairs, its standard error and, beyond two of them, an order."""
    differences = [ours - theirs for ours, theirs in zip(own, base, strict=True)]
    gap, off = mean(differences), error(differences)
    sure = off is not None and abs(gap) > 2 * off
    order = ("above" if gap > 0 else "below") if sure else None
    return {"difference": gap, "difference_error": off, "order": order}


def error(values: list[float]) -> float | None:
    """Return the standard error of a mean, None of one value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


if __name__ == "__main__":
    main()
