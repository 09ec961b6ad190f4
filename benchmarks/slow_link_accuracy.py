"""Seconds to a test accuracy on a slow network for every sync, over torch DDP.

`ratio` = DDP's seconds to the target over those of `daso`, at 1 Gbit; 0 if `daso` misses the
target. `spread` = its range over the seeds (`ratios`), each with its own target.

Set-up: eight epochs of CIFAR-10 with the model, the replicas and the strategies of `slow_link`. One
seed, and three for the strategies that decide the target and the ratio or end near the target
(`THREE_SEEDS`). Accuracies are measured here; step times come from the record of `slow_link`
(`steps` names its commit). Accuracies depend neither on links nor on transport, so replicas are
threads of one process with host names. The learning rate is the one at which `every-step` has the
best accuracy after the last epoch. All strategies use it, along a cosine, except `demo`, whose
steps are signs. Tuning runs have one rank, since the layout does not change the trained model.

Time to accuracy = the seconds of all updates up to the first epoch with an accuracy (mean over
seeds) of at least the final one of `every-step` minus one point (`target`). The peer takes as many
updates as `every-step`.

`figures` has times to accuracy by link and strategy, `peer` DDP's for each of them. `strategies`
has accuracy (0-1) per epoch, the mean and by seed (`curves`), bytes per update, times to accuracy
and of all epochs (`run_s`). `tuning` has the accuracies at each learning rate.

    python benchmarks/slow_link_accuracy.py [--quick]

Label: measured. Time: two cells run at a time, each takes 5 to 18 minutes, that of `demo` 48. A
start begins no cell after 28 minutes and prints how many are left; the start that finishes the last
cell writes the record. `--quick`: two learning rates, three epochs of 4,000 images.
"""

from __future__ import annotations

import json
import time
from functools import partial

from bench import Bench, RunResult, cifar_paths, exit_if_incomplete, parse_quick
from objectives_cifar10 import run_jobs
from phases import Row, accuracy_tables, average_seeds, counted_bytes
from record import ROOT, publish
from strategies import HOST_OF_RANK, STRATEGIES, common_run

from dtrain.schema import Table

BUDGET_S = 28 * 60
RATES = (0.025, 0.05, 0.1, 0.2)
SEEDS = 3
THREE_SEEDS = ("every-step", "daso", "local-sgd", "qsr")


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = parse_quick(__doc__)
    path = ROOT / "benchmarks" / "records" / "slow_link.json"
    timings = json.loads(path.read_text(encoding="utf-8"))
    bench, until = Bench("slow_link_accuracy", quick), time.monotonic() + BUDGET_S
    rates = RATES[1:3] if quick else RATES
    seeds = {name: range(SEEDS if name in THREE_SEEDS and not quick else 1) for name in STRATEGIES}
    cells = [(name, seed) for name, numbers in seeds.items() for seed in numbers]
    jobs = [(f"rate-{lr}", partial(measure_learning_rate, bench, quick, lr)) for lr in rates]
    rows = run_jobs(bench, jobs, 2, until)
    missing = len(jobs) - len(rows)
    exit_if_incomplete(missing + len(cells) if missing else 0)
    tuning = {lr: rows[f"rate-{lr}"]["curve"] for lr in rates}
    best = max(rates, key=lambda lr: float(tuning[lr][-1]))
    jobs = [(cell_name(*cell), partial(measure_cell, bench, quick, *cell, best)) for cell in cells]
    rows = run_jobs(bench, jobs, 2, until)
    exit_if_incomplete(len(jobs) - len(rows))
    by_seed = {
        name: [rows[cell_name(name, seed)] for seed in numbers] for name, numbers in seeds.items()
    }
    averages = {name: average_seeds(seed_rows) for name, seed_rows in by_seed.items()}
    tables = accuracy_tables(averages, timings)
    ratios = [
        daso_ratio(accuracy_tables({name: by_seed[name][seed] for name in THREE_SEEDS}, timings))
        for seed in seeds["every-step"]
    ]
    tables |= {"lr": best, "tuning": {str(lr): curve for lr, curve in tuning.items()}}
    tables |= {"ratio": daso_ratio(tables), "ratios": ratios, "spread": max(ratios) - min(ratios)}
    publish("slow_link_accuracy", "measured", quick=quick, **tables)


def daso_ratio(tables: Row) -> float:
    """Return DDP's time to the target over that of `daso`; 0 if `daso` misses the target."""
    key = "1gbit daso to_accuracy_s"
    times, peer = tables["figures"], tables["peer"]
    return float(peer[key] / times[key]) if key in times else 0.0


def cell_name(name: str, seed: int) -> str:
    """Return the name of the cell of a strategy and a seed."""
    return name.replace(" ", "-") + (f"-seed-{seed}" if seed else "")


def measure_learning_rate(bench: Bench, quick: bool, lr: float) -> Row:
    """Return the accuracy per epoch of `every-step`, on one rank."""
    result = bench.train(make_run(quick, "every-step", lr), 1, subfolder=f"rate-{lr}")
    return {"curve": accuracy_curve(result)}


def measure_cell(bench: Bench, quick: bool, name: str, seed: int, lr: float) -> Row:
    """Return the accuracy per epoch of a strategy, and its bytes per update."""
    run = make_run(quick, name, lr) | {"seed": seed}
    result = bench.train_in_threads(run, HOST_OF_RANK, subfolder=cell_name(name, seed))
    updates = result.summary["updates"]
    counted = counted_bytes(result)
    per_update = {f"{key}_per_update": value / updates for key, value in counted.items()}
    return {"curve": accuracy_curve(result), "updates": updates, **per_update}


def make_run(quick: bool, name: str, lr: float) -> Table:
    """Return a run file."""
    train, test = cifar_paths()
    data: Table = {"name": "hdf5", "train": train, "test": test}
    if quick:
        sizes = {"rows": 4000, "tests": 1000}
        data = {"name": "user:subset", "train": train, "test": test, **sizes}
    return common_run(name, lr) | {"epochs": 3 if quick else 8, "data": data}


def accuracy_curve(result: RunResult) -> list[float]:
    """Return the test accuracy (0-1) after each epoch."""
    return [float(record["test_accuracy"]) for record in result.eval_records]


if __name__ == "__main__":
    main()
