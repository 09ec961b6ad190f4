"""What each strategy needs to an accuracy on a slow network, beside torch DDP.

Measured accuracies, times what `slow_link` measured of steps (its record; `steps` names its
commit): eight epochs of CIFAR-10 with the model, the replicas and the strategies of `slow_link`,
one seed, and three of the strategies on which the target and the ratio hang or which end near it
(`SEVERAL`). The curve depends neither on the link nor on the transport, so replicas are threads of
one process on hosts with names.

* Tuning: the learning rate of `every-step`, by its accuracy after the last epoch. All strategies
  use it, along a cosine, but `demo`, whose steps are signs. One rank does the tuning, since no
  layout changes what is learnt.

Time to accuracy = the seconds of all updates up to the first epoch after which the accuracy, the
mean over seeds, is at most one point below the final one of `every-step` (`target`). The peer takes
the updates of `every-step`.

`ratio` = DDP's time over that of `daso` at 1 Gbit, 0 where `daso` does not come there; `spread` =
the range of this over the seeds (`ratios`), each with its own target. `figures` has times to
accuracy by link and strategy, `peer` DDP's for each of them. `strategies` has accuracy (0-1) per
epoch, the mean and seed by seed (`curves`), bytes per update, and times, that of all epochs
(`run_s`) too; `tuning` the accuracies at each learning rate.

    python benchmarks/slow_link_accuracy.py [--quick]

Cells are kept, two are measured beside each other, each 5 to 18 minutes long, that of `demo` 48: a
start begins none after 28 minutes, then says how many are left; the record is written by the start
that finds none. `--quick`: two learning rates, three epochs of 4,000 images.
"""

from __future__ import annotations

import json
import time
from functools import partial

from bench import Bench, Told, asked, cifar, complete
from objectives_cifar10 import trained
from phases import Row, counted, joined, together
from record import ROOT, publish
from strategies import PLACES, STRATEGIES, base

from dtrain.schema import Table

BUDGET_S = 28 * 60
RATES = (0.025, 0.05, 0.1, 0.2)
SEEDS = 3
SEVERAL = ("every-step", "daso", "local-sgd", "qsr")


def main() -> None:
    """Train the cells that are missing; publish the record when none is."""
    quick = asked(__doc__)
    path = ROOT / "benchmarks" / "records" / "slow_link.json"
    steps = json.loads(path.read_text(encoding="utf-8"))
    bench, until = Bench("slow_link_accuracy", quick), time.monotonic() + BUDGET_S
    rates = RATES[1:3] if quick else RATES
    seeds = {name: range(SEEDS if name in SEVERAL and not quick else 1) for name in STRATEGIES}
    cells = [(name, seed) for name, own in seeds.items() for seed in own]
    jobs = [(f"rate-{lr}", partial(tuned, bench, quick, lr)) for lr in rates]
    told = trained(bench, jobs, 2, until)
    left = len(jobs) - len(told)
    complete(left + len(cells) if left else 0)
    tuning = {lr: told[f"rate-{lr}"]["curve"] for lr in rates}
    best = max(rates, key=lambda lr: float(tuning[lr][-1]))
    jobs = [(cell(*each), partial(learnt, bench, quick, *each, best)) for each in cells]
    told = trained(bench, jobs, 2, until)
    complete(len(jobs) - len(told))
    rows = {name: [told[cell(name, seed)] for seed in own] for name, own in seeds.items()}
    tables = joined({name: together(own) for name, own in rows.items()}, steps)
    ratios = [
        over(joined({name: rows[name][seed] for name in SEVERAL}, steps))
        for seed in seeds["every-step"]
    ]
    tables |= {"lr": best, "tuning": {str(lr): curve for lr, curve in tuning.items()}}
    tables |= {"ratio": over(tables), "ratios": ratios, "spread": max(ratios) - min(ratios)}
    publish("slow_link_accuracy", "measured", quick=quick, **tables)


def over(tables: Row) -> float:
    """Return DDP's time to the accuracy over that of `daso`, 0 where it does not come there."""
    key = "1gbit daso to_accuracy_s"
    times, peer = tables["figures"], tables["peer"]
    return float(peer[key] / times[key]) if key in times else 0.0


def cell(name: str, seed: int) -> str:
    """Return the name of a strategy's cell."""
    return name.replace(" ", "-") + (f"-seed-{seed}" if seed else "")


def tuned(bench: Bench, quick: bool, lr: float) -> Row:
    """Return the accuracy per epoch of `every-step`, on one rank."""
    return {"curve": curve(bench.train(run(quick, "every-step", lr), 1, where=f"rate-{lr}"))}


def learnt(bench: Bench, quick: bool, name: str, seed: int, lr: float) -> Row:
    """Return the accuracy per epoch of a strategy, and its bytes per update."""
    asked_for = run(quick, name, lr) | {"seed": seed}
    told = bench.inside(asked_for, PLACES, where=cell(name, seed))
    updates = told.summary["updates"]
    per_update = {f"{key}_per_update": value / updates for key, value in counted(told).items()}
    return {"curve": curve(told), "updates": updates, **per_update}


def run(quick: bool, name: str, lr: float) -> Table:
    """Return a run file."""
    train, test = cifar()
    data: Table = {"name": "hdf5", "train": train, "test": test}
    if quick:
        part = {"rows": 4000, "tests": 1000}
        data = {"name": "user:subset", "train": train, "test": test, **part}
    return base(name, lr) | {"epochs": 3 if quick else 8, "data": data}


def curve(told: Told) -> list[float]:
    """Return the test accuracy (0-1) after each epoch."""
    return [float(record["test_accuracy"]) for record in told.tested]


if __name__ == "__main__":
    main()
