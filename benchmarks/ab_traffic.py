"""What AB training sends between nodes, and what that costs in accuracy: a perceptron and a CNN.

Measured, with `backprop` and one block: four replicas on two nodes, two each, 32 samples per
replica, AdamW along a cosine, three seeds. `mlp`: 3072-1024-1024-1024-10, CIFAR-10, 5 epochs,
weight decay 0.1. `vgg`: six convolutions in the manner of VGG and a head, batch statistics, 10
epochs of 10,000 images, 2,000 test images; weight decay 4, with which rate x decay x updates is of
the size that it has in the paper's run of 150 epochs at 0.1, so that ranks fall, and with which
`every-step` is better, too. `every-step` and `ab` with its default fields. Replicas are threads of
one process on hosts with names: neither accuracy nor bytes depend on the transport.

* Interfaces: one epoch of 2,000 images of each on two Slurm hosts without a bound, where the bytes
  that the hosts' interfaces send, headers included, stand beside those that were counted.

`figures` has, per net, the mean test accuracy (0-1), the gigabytes between nodes and the
compression of the trained model; `peer` those of `every-step`. `ratio` = bytes of `ab` between
nodes over those of `every-step`, the worse net; `spread` = its range over seeds. `nets` has all:
seeds, the paired difference in accuracy with its standard error, ranks, traffic saved by weight.
Beside the compression stands the paper's 44.14 for VGG-16 after 150 epochs (*abstract*, arXiv
2405.01067).

    python benchmarks/ab_traffic.py [--quick]

Cells are kept: a start works for 35 minutes, then says how many are left. `--quick`: one seed, one
epoch of 2,000 images. Needs what `tests/cluster` needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any

from bench import Bench, Told, asked, cifar, complete
from hosts import Hosts, hosts
from objectives_cifar10 import BUDGET_S, SEEDS, difference, error, trained
from record import publish

from dtrain.schema import Table

PLACES = ("a", "a", "b", "b")
PAPER = 44.14
NETS: dict[str, Table] = {
    "mlp": {
        "epochs": 5,
        "model": {"name": "mlp", "widths": [1024] * 3},
        "optimizer": {"name": "adamw", "lr": 3e-4, "weight-decay": 0.1},
    },
    "vgg": {
        "epochs": 10,
        "model": {"name": "cnn", "widths": [[32], [64], [128, 128], [256, 256]]},
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight-decay": 4.0},
    },
}
PART = {"rows": 10000, "tests": 2000}
SYNCS = ("every-step", "ab")

Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = asked(__doc__)
    bench, until = Bench("ab_traffic", quick), time.monotonic() + BUDGET_S
    seeds = range(1 if quick else SEEDS)
    pairs = [(net, sync) for net in NETS for sync in SYNCS]
    jobs: list[Job] = [
        (name, partial(learnt, bench, run(net, sync, seed, quick), name))
        for seed in seeds
        for net, sync in pairs
        for name in [f"{net}-{sync}-{seed}"]
    ]
    told = trained(bench, jobs, 2, until)
    with hosts(2, 2) as cluster:
        wires: list[Job] = [
            (f"wire-{net}-{sync}", partial(wired, bench, cluster, run(net, sync, 0, True)))
            for net, sync in pairs
        ]
        told |= trained(bench, wires, 1, until)
    left = len(jobs) + len(wires) - len(told)
    complete(left)
    rows = {net: summed(net, told, seeds) for net in NETS}
    worse = max(rows.values(), key=lambda row: float(row["ratio"]))
    figures, peer = (
        {f"{n} {k}": v for n, r in rows.items() for k, v in r[s].items()} for s in SYNCS[::-1]
    )
    spans = max(worse["ratios"]) - min(worse["ratios"])
    publish(
        "ab_traffic", "measured", figures, peer, worse["ratio"], spans,
        quick=quick, nets=rows, paper_compression=PAPER,
    )  # fmt: skip


def run(net: str, sync: str, seed: int, short: bool) -> Table:
    """Return a run file."""
    train, test = cifar()
    data: Table = {"name": "hdf5", "train": train, "test": test}
    if short or net == "vgg":
        part = {"rows": 2000, "tests": 500} if short else PART
        data = {"name": "user:subset", "train": train, "test": test, **part}
    return {
        "seed": seed,
        "threads": 1,
        "batch-size": 32 * len(PLACES),
        "data": data,
        "mesh": {"stages": 1, "placement": "replicas-in-node"},
        "partition": {"blocks": 1},
        "objective": {"name": "backprop"},
        "sync": {"name": sync},
        "lr": {"name": "cosine"},
        **NETS[net],
    } | ({"epochs": 1} if short else {})


def learnt(bench: Bench, table: Table, name: str) -> Row:
    """Return accuracy, bytes and what low rank saved."""
    summary = bench.inside(table, PLACES, where=name).summary
    keys = ("test_accuracy", "bytes_inter_node", "bytes_intra_node", "compression")
    return {key: summary[key] for key in (*keys, "traffic_saved", "low_rank")}


def wired(bench: Bench, cluster: Hosts, table: Table) -> Row:
    """Return counted bytes between hosts beside those of their interfaces."""
    cluster.shape(None)
    before = cluster.sent()
    told: Told = bench.started(table, cluster.start)
    counted, sent = told.summary["bytes_inter_node"], cluster.sent() - before
    return {"counted": counted, "interfaces": sent, "ratio": sent / counted}


def summed(net: str, told: dict[str, Row], seeds: range) -> Row:
    """Return what one net's cells tell together."""
    cells = {sync: [told[f"{net}-{sync}-{seed}"] for seed in seeds] for sync in SYNCS}
    sent = {sync: [row["bytes_inter_node"] for row in rows] for sync, rows in cells.items()}
    ratios = [a / b for a, b in zip(sent["ab"], sent["every-step"], strict=True)]
    accuracies = {s: [row["test_accuracy"] for row in rows] for s, rows in cells.items()}
    means = {
        sync: {
            "test_accuracy": mean(accuracies[sync]),
            "gigabytes": mean(sent[sync]) / 1e9,
            "compression": mean(row["compression"] or 1.0 for row in rows),
        }
        for sync, rows in cells.items()
    }
    return {
        **means,
        "ratio": max(ratios),
        "ratios": ratios,
        "seeds": accuracies,
        "standard_error": {sync: error(own) for sync, own in accuracies.items()},
        **difference(accuracies["ab"], accuracies["every-step"]),
        "low_rank": [row["low_rank"] for row in cells["ab"]],
        "interfaces_over_counted": {sync: told[f"wire-{net}-{sync}"]["ratio"] for sync in SYNCS},
    }


if __name__ == "__main__":
    main()
