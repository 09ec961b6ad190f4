"""PETRA on CIFAR-10: a RevNet of 8 units over 4 ranks, against backpropagation.

`ratio` = test accuracy of `petra` over that of backpropagation with equal updates and seeds, the
median over seeds; `spread` = its range. The bound is a difference of 2 points.

* Accuracy: RevNet with units 2, 2, 2, 2 and streams of 16 channels, GroupNorm, in four blocks of
  two units (stem and head in the outer ones), SGD with Nesterov momentum 0.9 and weight decay 5e-4
  along a cosine from 0.025 (0.1 for 256 samples, the paper's rule), updates of 64 samples in eight
  micro-batches, 6 epochs of 8,000 images, 2,000 test images. Cells run on one rank, since the
  layout does not change the trained model; the first one also on four ranks, whose digest must be
  the same. `delays` has cells with a longer delay, one seed each: two micro-batches per update, and
  ten blocks (stem, each unit and head).
* Memory: the same net on four ranks, and a RevNet of eight units at one resolution, whose inner
  ranks have reversible blocks alone, in four and in ten blocks. `figures` has bytes per rank of
  live micro-batches (planned) and at the peak (counted), with the number of micro-batches in
  flight. `peer` has those of `pipelined`.
* Traffic: bytes per sample of `petra` and `pipelined`. `samples_per_s` says nothing of speed, since
  four ranks share two cores.

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
BOUND = 0.02
FOUR_BLOCKS: Table = {"cuts": [3, 5, 7]}
TEN_BLOCKS: Table = {"blocks": 10}
UNITS = [2, 2, 2, 2]
MEMORIES: dict[str, tuple[list[int], Table]] = {
    "revnet": (UNITS, FOUR_BLOCKS),
    "one resolution": ([8], FOUR_BLOCKS),
    "one resolution, 10 blocks": ([8], TEN_BLOCKS),
}
PETRA: Table = {
    "schedule": {"name": "petra"},
    "partition": FOUR_BLOCKS,
    "micro-batches": 8,
}
MAIN = {
    "petra": PETRA,
    "backprop": PETRA | {"schedule": {"name": "1f1b"}},
}
DELAYS = {
    "petra, 2 micro-batches": PETRA | {"micro-batches": 2},
    "petra, 10 blocks": PETRA | {"partition": TEN_BLOCKS},
    "petra, 10 blocks, 2 micro-batches": PETRA | {"partition": TEN_BLOCKS, "micro-batches": 2},
}


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = parse_quick(__doc__)
    bench, until = Bench("petra_cifar10", quick), time.monotonic() + BUDGET_S
    seeds = range(1 if quick else SEEDS)
    cells = [
        *((label, keys, seed) for seed in seeds for label, keys in MAIN.items()),
        *((label, keys, 0) for label, keys in DELAYS.items()),
    ]
    jobs = [
        (f"{label} {seed}", partial(measure_accuracy, bench, label, keys, seed, quick))
        for label, keys, seed in cells
    ]
    memories = [
        (f"memory {schedule} {net}", partial(measure_memory, bench, schedule, net, quick))
        for schedule in ("petra", "pipelined")
        for net in MEMORIES
    ]
    results = run_jobs(bench, jobs, 2, until)
    if len(results) == len(jobs):  # speeds are measured alone
        results |= run_jobs(bench, memories, 1, until)
    exit_if_incomplete(len(jobs) + len(memories) - len(results))
    rows = {
        label: [results[f"{label} {seed}"]["test_accuracy"] for seed in seeds] for label in MAIN
    }
    difference = paired_difference(rows["petra"], rows["backprop"])
    figures = {"accuracy": mean(rows["petra"]), **memory_figures(results, "petra")}
    peer = {"accuracy": mean(rows["backprop"]), **memory_figures(results, "pipelined")}
    ratios = [ours / theirs for ours, theirs in zip(*rows.values(), strict=True)]
    publish(
        "petra_cifar10", "measured", figures, peer, median(ratios), spread(ratios),
        quick=quick, accuracies=rows, **difference, bound=BOUND,
        delays={label: results[f"{label} 0"]["test_accuracy"] for label in DELAYS},
        same_digest_on_four_ranks=results["petra 0"]["same_digest"],
    )  # fmt: skip


def make_run(keys: Table, seed: int, quick: bool, units: list[int]) -> Table:
    """Return the run file of a cell."""
    train, test = cifar_paths()
    rows, tests = (512, 256) if quick else (8000, 2000)
    return {
        "seed": seed,
        "epochs": 1 if quick else 6,
        "batch-size": 64,
        "data": {"name": "user:subset", "train": train, "test": test, "rows": rows, "tests": tests},
        "model": {"name": "revnet", "units": units, "width": 16, "norm": "group"},
        "objective": {"name": "backprop"},
        "optimizer": {
            "name": "sgd",
            "lr": 0.025,
            "momentum": 0.9,
            "nesterov": True,
            "weight-decay": 5e-4,
        },
        "lr": {"name": "cosine", "warmup-updates": 2 if quick else 50},
        "evaluate": {"every": 1 if quick else 6},
        **keys,
    }


def measure_accuracy(
    bench: Bench, label: str, keys: Table, seed: int, quick: bool
) -> dict[str, Any]:
    """Train on one rank; with the first seed of `petra` also a short run on one and four ranks."""
    run = make_run(keys, seed, quick, UNITS)
    result = bench.train(run, 1, subfolder=f"{label}-{seed}".replace(" ", "-"))
    row = {"test_accuracy": result.summary["test_accuracy"]}
    if (label, seed) == ("petra", 0):
        short = {key: value for key, value in run.items() if key != "epochs"} | {"updates": 6}
        digests = {
            bench.train(short, ranks, subfolder=f"digest-{ranks}").summary["digest"]
            for ranks in (1, RANKS)
        }
        row["same_digest"] = len(digests) == 1
    return row


def measure_memory(bench: Bench, schedule: str, net: str, quick: bool) -> dict[str, Any]:
    """Train a few updates of one micro-batch on four ranks; return memory, bytes and speed."""
    updates = 24 if quick else 60
    units, partition = MEMORIES[net]
    keys: Table = {"schedule": {"name": schedule}, "partition": partition, "micro-batches": 1}
    run = make_run(keys, 0, quick, units)
    run |= {"batch-size": 16, "updates": updates, "segment": updates // 2}
    del run["epochs"]
    result = bench.train(run, RANKS, subfolder=f"memory {schedule} {net}".replace(" ", "-"))
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
    for net in MEMORIES:
        row = results[f"memory {schedule} {net}"]
        for key in ("in_flight", "live_bytes", "peak_bytes"):
            figures |= {f"{net} {key} rank {i}": value for i, value in enumerate(row[key])}
        figures |= {f"{net} {key}": row[key] for key in ("bytes_per_sample", "samples_per_s")}
    return figures


if __name__ == "__main__":
    main()
