"""PETRA on CIFAR-10: a RevNet of 8 units over 4 ranks, against backpropagation.

`ratio` = test accuracy of `petra` over that of backpropagation with equal updates and seeds, the
median over seeds; `spread` = its range. The bound is a difference of 2 points.

* Accuracy: RevNet with units 2, 2, 2, 2 and streams of 16 channels, GroupNorm, ten blocks (stem,
  eight units, head), SGD with Nesterov momentum 0.9 and weight decay 5e-4 along a cosine, updates
  of 64 samples in two micro-batches, 6 epochs of 8,000 images, 2,000 test images. Cells run on one
  rank, since the layout does not change the trained model; the first one also on four ranks, whose
  digest must be the same.
* Memory: the same net on four ranks, and a RevNet of eight units at one resolution, whose inner
  ranks have reversible blocks alone. `figures` has bytes per rank of live micro-batches (planned)
  and at the peak (counted), with the number of micro-batches in flight. `peer` has those of
  `pipelined`.
* Traffic: bytes per sample of `petra` and `pipelined`.

    python benchmarks/petra_cifar10.py [--quick]

Label: measured. Time: starts of 35 minutes; each prints how many cells are left. `--quick`: one
seed, one epoch of 512 images.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import mean, median
from typing import Any

from bench import Bench, cifar_paths, exit_if_incomplete, parse_quick, spread
from objectives_cifar10 import paired_difference, run_jobs
from record import publish

from dtrain.schema import Table

BUDGET_S = 35 * 60
SEEDS = 3
RANKS = 4
BLOCKS = 10
"""Stem, eight units and head."""


BOUND = 0.02
UNITS: dict[str, list[int]] = {"revnet": [2, 2, 2, 2], "one resolution": [8]}


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = parse_quick(__doc__)
    bench, until = Bench("petra_cifar10", quick), time.monotonic() + BUDGET_S
    seeds = range(1 if quick else SEEDS)
    names = "petra", "backprop"
    cells = [
        (f"{name}-{seed}", partial(measure_accuracy, bench, name, seed, quick))
        for seed in seeds
        for name in names
    ]
    memories = [
        (f"memory-{schedule}-{net}", partial(measure_memory, bench, schedule, net, quick))
        for schedule in ("petra", "pipelined")
        for net in UNITS
    ]
    results = run_jobs(bench, cells, 2, until)
    if len(results) == len(cells):  # speeds are measured alone
        results |= run_jobs(bench, memories, 1, until)
    exit_if_incomplete(len(cells) + len(memories) - len(results))
    rows = {name: [results[f"{name}-{seed}"]["test_accuracy"] for seed in seeds] for name in names}
    difference = paired_difference(rows["petra"], rows["backprop"])
    figures = {"accuracy": mean(rows["petra"]), **memory_figures(results, "petra")}
    peer = {"accuracy": mean(rows["backprop"]), **memory_figures(results, "pipelined")}
    ratios = [ours / theirs for ours, theirs in zip(*rows.values(), strict=True)]
    publish(
        "petra_cifar10", "measured", figures, peer, median(ratios), spread(ratios),
        quick=quick, accuracies=rows, **difference, bound=BOUND,
        same_digest_on_four_ranks=results["petra-0"]["same_digest"],
    )  # fmt: skip


def make_run(name: str, seed: int, quick: bool, units: list[int]) -> Table:
    """Return the run file of a schedule; "backprop" is that without a stale gradient."""
    train, test = cifar_paths()
    rows, tests = (512, 256) if quick else (8000, 2000)
    return {
        "seed": seed,
        "epochs": 1 if quick else 6,
        "batch-size": 64,
        "micro-batches": 2,
        "data": {"name": "user:subset", "train": train, "test": test, "rows": rows, "tests": tests},
        "model": {"name": "revnet", "units": units, "width": 16, "norm": "group"},
        "partition": {"blocks": BLOCKS},
        "objective": {"name": "backprop"},
        "schedule": {"name": "1f1b" if name == "backprop" else name},
        "optimizer": {
            "name": "sgd",
            "lr": 0.05,
            "momentum": 0.9,
            "nesterov": True,
            "weight-decay": 5e-4,
        },
        "lr": {"name": "cosine", "warmup-updates": 2 if quick else 50},
        "evaluate": {"every": 1 if quick else 6},
    }


def measure_accuracy(bench: Bench, name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train on one rank; with the first seed of `petra` also a short run on one and four ranks."""
    run = make_run(name, seed, quick, UNITS["revnet"])
    result = bench.train(run, 1, subfolder=f"{name}-{seed}")
    row = {"test_accuracy": result.summary["test_accuracy"]}
    if (name, seed) == ("petra", 0):
        short = {key: value for key, value in run.items() if key != "epochs"} | {"updates": 6}
        digests = {
            bench.train(short, ranks, subfolder=f"digest-{ranks}").summary["digest"]
            for ranks in (1, RANKS)
        }
        row["same_digest"] = len(digests) == 1
    return row


def measure_memory(bench: Bench, schedule: str, net: str, quick: bool) -> dict[str, Any]:
    """Train a few updates of one micro-batch on four ranks; return memory, bytes and speed."""
    run = make_run(schedule, 0, quick, UNITS[net])
    updates = 24 if quick else 60
    run |= {"micro-batches": 1, "batch-size": 16, "updates": updates, "segment": updates // 2}
    del run["epochs"]
    subfolder = f"memory-{schedule}-{net.replace(' ', '-')}"
    result = bench.train(run, RANKS, subfolder=subfolder)
    summary, plan = result.summary, bench.plan(run, RANKS)
    sent = summary["bytes_intra_node"] + summary["bytes_inter_node"]
    return {
        "in_flight": summary["peak_live_micros"],
        "live_bytes": [rank["live_bytes"] for rank in plan["memory"]],
        "peak_bytes": summary["peak_memory_bytes"],
        "bytes_per_sample": sent / summary["samples"],
        "samples_per_s": result.samples_per_s(),
    }


def memory_figures(results: dict[str, Any], schedule: str) -> dict[str, float]:
    """Return the memory of every rank, and bytes and samples, as flat figures."""
    figures: dict[str, float] = {}
    for net in UNITS:
        row = results[f"memory-{schedule}-{net}"]
        for key in ("in_flight", "live_bytes", "peak_bytes"):
            figures |= {f"{net} {key} rank {i}": value for i, value in enumerate(row[key])}
        figures |= {f"{net} {key}": row[key] for key in ("bytes_per_sample", "samples_per_s")}
    return figures


if __name__ == "__main__":
    main()
