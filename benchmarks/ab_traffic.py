"""Bytes between nodes and accuracy of AB training, over `every-step`, for an MLP and a CNN.

`ratio` = bytes of `ab` between nodes over those of `every-step`, the net with the larger ratio;
`spread` = its range over seeds.

Set-up: `backprop`, one block, four replicas on two nodes, 32 samples per replica, AdamW along a
cosine, CIFAR-10, three seeds; `every-step` and `ab` with its default keys.

* `mlp`: 3072-1024-1024-1024-10, 5 epochs, weight decay 0.1.
* `vgg`: six convolutions in the manner of VGG and a head, batch statistics, 10 epochs of 10,000
  images, 2,000 test images, weight decay 4. With this weight decay, rate x decay x updates is as
  large as in the paper's run of 150 epochs at 0.1, so that ranks fall. `every-step` is better with
  it, too.

Replicas are threads of one process with host names, since neither accuracy nor bytes depend on the
transport. One further epoch of 2,000 images runs on two Slurm hosts without a limit, to compare
counted bytes with those that the interfaces send, headers included.

`figures` has, by net, the mean test accuracy (0-1), the gigabytes between nodes and the compression
of the trained model; `peer` those of `every-step`. `nets` has seeds, the paired difference in
accuracy with its standard error, ranks, and traffic saved by weight. `paper_compression` is the
paper's 44.14 for VGG-16 after 150 epochs (abstract, arXiv 2405.01067).

    python benchmarks/ab_traffic.py [--quick]

Label: measured. Time: starts of 35 minutes; each prints how many cells are left. `--quick`: one
seed, one epoch of 2,000 images. Needs the packages that `tests/cluster` needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any

from bench import Bench, cifar_paths, exit_if_incomplete, parse_quick, spread
from hosts import Hosts, start_hosts
from objectives_cifar10 import BUDGET_S, SEEDS, paired_difference, run_jobs, standard_error
from record import publish
from strategies import HOST_OF_RANK

from dtrain.schema import Table

PAPER_COMPRESSION = 44.14
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
SUBSET = {"rows": 10000, "tests": 2000}
SYNCS = ("every-step", "ab")

Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = parse_quick(__doc__)
    bench, until = Bench("ab_traffic", quick), time.monotonic() + BUDGET_S
    seeds = range(1 if quick else SEEDS)
    pairs = [(net, sync) for net in NETS for sync in SYNCS]
    jobs: list[Job] = [
        (name, partial(train_cell, bench, make_run(net, sync, seed, quick), name))
        for seed in seeds
        for net, sync in pairs
        for name in [f"{net}-{sync}-{seed}"]
    ]
    results = run_jobs(bench, jobs, 2, until)
    with start_hosts(2, 2) as hosts:
        wire_jobs: list[Job] = [
            (
                f"wire-{net}-{sync}",
                partial(measure_interfaces, bench, hosts, make_run(net, sync, 0, True)),
            )
            for net, sync in pairs
        ]
        results |= run_jobs(bench, wire_jobs, 1, until)
    exit_if_incomplete(len(jobs) + len(wire_jobs) - len(results))
    rows = {net: summarise_net(net, results, seeds) for net in NETS}
    worst = max(rows.values(), key=lambda row: float(row["ratio"]))
    figures, peer = (
        {f"{net} {key}": value for net, row in rows.items() for key, value in row[sync].items()}
        for sync in ("ab", "every-step")
    )
    publish(
        "ab_traffic", "measured", figures, peer, worst["ratio"], spread(worst["ratios"]),
        quick=quick, nets=rows, paper_compression=PAPER_COMPRESSION,
    )  # fmt: skip


def make_run(net: str, sync: str, seed: int, short: bool) -> Table:
    """Return a run file."""
    train, test = cifar_paths()
    data: Table = {"name": "hdf5", "train": train, "test": test}
    if short or net == "vgg":
        sizes = {"rows": 2000, "tests": 500} if short else SUBSET
        data = {"name": "user:subset", "train": train, "test": test, **sizes}
    return {
        "seed": seed,
        "threads": 1,
        "batch-size": 32 * len(HOST_OF_RANK),
        "data": data,
        "mesh": {"stages": 1, "placement": "replicas-in-node"},
        "partition": {"blocks": 1},
        "objective": {"name": "backprop"},
        "sync": {"name": sync},
        "lr": {"name": "cosine"},
        **NETS[net],
    } | ({"epochs": 1} if short else {})


def train_cell(bench: Bench, table: Table, name: str) -> Row:
    """Return accuracy, bytes, compression and the saved traffic."""
    summary = bench.train_in_threads(table, HOST_OF_RANK, subfolder=name).summary
    keys = ("test_accuracy", "bytes_inter_node", "bytes_intra_node", "compression")
    return {key: summary[key] for key in (*keys, "traffic_saved", "low_rank")}


def measure_interfaces(bench: Bench, hosts: Hosts, table: Table) -> Row:
    """Return counted bytes between hosts, bytes sent by their interfaces, and the quotient."""
    hosts.set_rate(None)
    before = hosts.bytes_sent()
    result = bench.train_with(hosts.run, table)
    counted, sent = result.summary["bytes_inter_node"], hosts.bytes_sent() - before
    return {"counted": counted, "interfaces": sent, "ratio": sent / counted}


def summarise_net(net: str, results: dict[str, Row], seeds: range) -> Row:
    """Return means, ratios and paired differences of one net."""
    cells = {sync: [results[f"{net}-{sync}-{seed}"] for seed in seeds] for sync in SYNCS}
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
        "standard_error": {sync: standard_error(values) for sync, values in accuracies.items()},
        **paired_difference(accuracies["ab"], accuracies["every-step"]),
        "low_rank": [row["low_rank"] for row in cells["ab"]],
        "interfaces_over_counted": {sync: results[f"wire-{net}-{sync}"]["ratio"] for sync in SYNCS},
    }


if __name__ == "__main__":
    main()
