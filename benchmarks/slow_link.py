"""How replicas agree over a slow network: every strategy against torch DDP, in time to accuracy.

Measured, twice oversubscribed: two Slurm hosts on two cores, two ranks each, 32 samples per rank,
links of 1 Gbit, of 100 Mbit and without a bound between the hosts; an MLP 3072-1024x7-10 of 9.4
million parameters (37.8 MB), `backprop`, one block, SGD with momentum 0.9. Peer: torch DDP over
gloo, at the fastest of its settings (`peers/linked.py`), chosen anew each time.

* Timing: seconds of a step in each phase of a strategy, medians over segments of whole rounds, at
  least 24 steps of each phase; for `ab` and `oialr` also what a change of rank costs. At 1 Gbit
  `every-step`, `daso` and the peer take turns five times and the others once; at 100 Mbit, where a
  step takes seconds, and without a bound all do once.
* Tuning: the learning rate of `every-step`, by its accuracy after the last epoch. All strategies
  use it, along a cosine, but `demo`, whose steps are signs. One rank does the tuning, since no
  layout changes what is learnt.
* Accuracy: eight epochs of CIFAR-10 with every strategy once, one seed. The curve depends neither
  on the link nor on the transport, so replicas are threads of one process on hosts with names.

Time to accuracy = the seconds of all updates up to the first epoch after which the accuracy is at
most one point below the final one of `every-step`. The peer takes the updates of `every-step`.

`ratio` = DDP's step time over that of `daso` while it cycles, at 1 Gbit, the median of the pairs;
`spread` = its range. `figures` has step times and times to accuracy, `peer` DDP's for each of them.
`strategies` has accuracy per epoch, bytes per update, and of the timing part the counted bytes
between the hosts beside those that their interfaces sent, headers and all else included. The time
of `oialr` is that at its first ranks: an upper bound. `tuning` has the accuracy at each learning
rate, `ddp` all that was measured of the peer.

    python benchmarks/slow_link.py [--quick]

Needs what `tests/cluster` needs. Cells are kept: a start works for at most 35 minutes, then says
how many are left; the record is written by the start that finds none. `--quick`: one turn at
1 Gbit, two learning rates, three epochs of 4,000 images.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import final

from bench import Bench, Told, asked, cifar, spread
from hosts import Hosts, hosts
from phases import Row, changes, steps, summed
from record import publish
from strategies import EACH, NODES, PLACES, ROWS, SEGMENTS, STRATEGIES, base, rounds, timed

from dtrain.tables import Table

BUDGET_S = 34 * 60
TURNS = {"1gbit": 5, "100mbit": 1, "unshaped": 1}
"""How often it is timed, by the rate of the links, of what is in `PAIRED`; of all else once."""
PAIRED = ("every-step", "daso", "ddp")
COSTS_S = {"1gbit": 120.0, "100mbit": 480.0, "unshaped": 60.0, "rate": 900.0, "accuracy": 1200.0}
"""What a cell takes at most on a quiet machine; it does not start where there is less time."""
ORDER = (*PAIRED, *(name for name in STRATEGIES if name not in PAIRED))
RATES = (0.025, 0.05, 0.1, 0.2)


@final
@dataclass(frozen=True)
class Cell:
    """What is measured in one go: its name, the seconds that it needs, and how."""

    name: str
    cost_s: float
    make: Callable[[], Row]


@final
@dataclass(frozen=True)
class Cells:
    """All cells, of quick or of full mode."""

    bench: Bench
    quick: bool

    @property
    def turns(self) -> dict[str, int]:
        """How often everything takes its turn, by the rate of the links."""
        return {"1gbit": 1} if self.quick else TURNS

    def repeats(self, link: str, name: str) -> int:
        """Return how often a strategy is timed."""
        return self.turns[link] if name in PAIRED else 1

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return RATES[1:3] if self.quick else RATES

    def timing(self, cluster: Hosts) -> list[Cell]:
        """Return the cells of the timing part, in turns."""
        turns = [(link, turn) for link, most in self.turns.items() for turn in range(most)]
        return [
            Cell(_timing(link, name, turn), COSTS_S[link], partial(self._time, cluster, link, name))
            for link, turn in turns
            for name in ORDER
            if turn < self.repeats(link, name)
        ]

    def tuning(self) -> list[Cell]:
        """Return the cells that choose the learning rate."""
        return [Cell(f"rate-{lr}", COSTS_S["rate"], partial(self._tune, lr)) for lr in self.rates]

    def accuracy(self, lr: float) -> list[Cell]:
        """Return the cells of the accuracy part."""
        cost_s = COSTS_S["accuracy"]
        return [
            Cell(_learning(name), cost_s, partial(self._learn, name, lr)) for name in STRATEGIES
        ]

    def _time(self, cluster: Hosts, link: str, name: str) -> Row:
        """Return the seconds of steps by phase, and what one run sent between the hosts."""
        cluster.shape(None if link == "unshaped" else link)
        if name == "ddp":
            return cluster.peer("linked", ROWS, rounds(name), SEGMENTS - 1)
        before = cluster.sent()
        told = self.bench.started(timed(name), cluster.start)
        sent = {"interface_bytes": cluster.sent() - before}
        seconds = {"step_s": steps(name, told), "changes_s": changes(name, told)}
        return {**seconds, **_bytes(told), **sent}

    def _tune(self, lr: float) -> Row:
        """Return the accuracy per epoch of `every-step`, on one rank."""
        told = self.bench.train(self._run("every-step", lr), 1, where=f"rate-{lr}")
        return {"curve": _curve(told)}

    def _learn(self, name: str, lr: float) -> Row:
        """Return the accuracy per epoch of a strategy, and its bytes per update."""
        told = self.bench.inside(self._run(name, lr), PLACES, where=_learning(name))
        updates = told.summary["updates"]
        per_update = {f"{key}_per_update": value / updates for key, value in _bytes(told).items()}
        return {"curve": _curve(told), "updates": updates, **per_update}

    def _run(self, name: str, lr: float) -> Table:
        """Return the run file of accuracy and tuning."""
        train, test = cifar()
        data: Table = {"name": "hdf5", "train": train, "test": test}
        if self.quick:
            part = {"rows": 4000, "tests": 1000}
            data = {"name": "user:subset", "train": train, "test": test, **part}
        return base(name, lr) | {"epochs": 3 if self.quick else 8, "data": data}


def main() -> None:
    """Measure the cells that are missing; publish the record when none is."""
    quick = asked(__doc__)
    cells = Cells(Bench("slow_link", quick), quick)
    until = time.monotonic() + BUDGET_S
    with hosts(NODES, EACH) as cluster:
        times, left = _measure(cells.bench, cells.timing(cluster), until)
    tuned, more = _measure(cells.bench, cells.tuning(), until, beside=2)
    if left + more:
        _wait(left + more + len(STRATEGIES))
    curves = {lr: tuned[f"rate-{lr}"]["curve"] for lr in cells.rates}
    best = max(cells.rates, key=lambda lr: float(curves[lr][-1]))
    told, left = _measure(cells.bench, cells.accuracy(best), until, beside=2)
    if left:
        _wait(left)
    by = {
        link: {
            name: [times[_timing(link, name, turn)] for turn in range(cells.repeats(link, name))]
            for name in ORDER
        }
        for link in cells.turns
    }
    ratios = [
        theirs["step_s"] / median(ours["step_s"]["cycling"])
        for ours, theirs in zip(by["1gbit"]["daso"], by["1gbit"]["ddp"], strict=True)
    ]
    tables = summed({name: told[_learning(name)] for name in STRATEGIES}, by)
    tables |= {"lr": best, "tuning": {str(lr): curve for lr, curve in curves.items()}}
    tables["ddp"] = {link: rows["ddp"] for link, rows in by.items()}
    spans = spread(ratios) if len(ratios) > 1 else None
    publish("slow_link", "measured", ratio=median(ratios), spread=spans, quick=quick, **tables)


def _measure(
    bench: Bench, cells: Iterable[Cell], until: float, beside: int = 1
) -> tuple[dict[str, Row], int]:
    """Return what cells tell, some measured beside each other, and how many are left.

    None is begun that needs more time than there is.
    """

    def one(cell: Cell) -> tuple[str, Row] | None:
        if not bench.has(cell.name) and time.monotonic() + cell.cost_s > until:
            return None
        return cell.name, bench.kept(cell.name, cell.make)

    with ThreadPoolExecutor(beside) as pool:
        told = list(pool.map(one, cells))
    return dict(filter(None, told)), told.count(None)


def _timing(link: str, name: str, turn: int) -> str:
    """Return the name of a cell of the timing part."""
    return f"{link}-{name.replace(' ', '-')}-{turn}"


def _learning(name: str) -> str:
    """Return the name of a cell of the accuracy part."""
    return f"accuracy-{name.replace(' ', '-')}"


def _wait(left: int) -> None:
    print(f"{left} cells are left: start again to go on", file=sys.stderr)
    sys.exit(0)


def _curve(told: Told) -> list[float]:
    """Return the test accuracy (0-1) after each epoch."""
    return [float(record["test_accuracy"]) for record in told.tested]


def _bytes(told: Told) -> dict[str, float]:
    """Return the counted bytes of a run, inside nodes and between them."""
    return {key: told.summary[key] for key in ("bytes_intra_node", "bytes_inter_node")}


if __name__ == "__main__":
    main()
