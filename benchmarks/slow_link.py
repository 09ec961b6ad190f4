"""How replicas agree over a slow network: seconds of a step with every strategy, and torch DDP's.

Measured, twice oversubscribed: two Slurm hosts on two cores, two ranks each, 32 samples per rank,
links of 1 Gbit, of 100 Mbit and without a bound between the hosts; an MLP 3072-1024x7-10 of 9.4
million parameters (37.8 MB), `backprop`, one block, SGD with momentum 0.9. Peer: torch DDP over
gloo, at the fastest of its settings (`peers/linked.py`), chosen anew each time.

Medians by phase of a strategy over segments of whole rounds, at least 24 steps of each phase; for
`ab` and `oialr` also what a change of rank costs. At 1 Gbit `every-step`, `daso` and the peer take
turns five times and the others once; at 100 Mbit, where a step takes seconds, and without a bound
all do once.

`ratio` = DDP's step time over that of `daso` while it cycles, at 1 Gbit, the median of the pairs;
`spread` = its range. `figures` has step times, `peer` DDP's for each of them. `links` has, by rate
and strategy, step times, and the counted bytes between the hosts beside those that their interfaces
sent, headers and all else included. The time of `oialr` is that at its first ranks: an upper bound.
`ddp` has all that was measured of the peer. What a strategy needs to an accuracy follows from this
record: `slow_link_accuracy`.

    python benchmarks/slow_link.py [--quick]

Needs what `tests/cluster` needs. Cells are kept: a start works for at most 35 minutes, then says
how many are left; the record is written by the start that finds none. `--quick`: one turn at
1 Gbit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

from bench import Bench, asked, complete, spread
from hosts import Hosts, hosts
from phases import Row, changes, counted, steps, timings
from record import publish
from strategies import EACH, NODES, ROWS, SEGMENTS, STRATEGIES, rounds, timed

BUDGET_S = 34 * 60
TURNS = {"1gbit": 5, "100mbit": 1, "unshaped": 1}
"""How often it is timed, by the rate of the links, of what is in `PAIRED`; of all else once."""
PAIRED = ("every-step", "daso", "ddp")
COSTS_S = {"1gbit": 120.0, "100mbit": 480.0, "unshaped": 60.0}
"""What a cell takes at most on a quiet machine; it does not start where there is less time."""
ORDER = (*PAIRED, *(name for name in STRATEGIES if name not in PAIRED))


def main() -> None:
    """Measure the cells that are missing; publish the record when none is."""
    quick = asked(__doc__)
    bench, until = Bench("slow_link", quick), time.monotonic() + BUDGET_S
    turns = {"1gbit": 1} if quick else TURNS
    told: dict[str, dict[str, list[Row]]] = {link: {n: [] for n in ORDER} for link in turns}
    left = 0
    with hosts(NODES, EACH) as cluster:
        for link, most in turns.items():
            for turn in range(most):
                for name in ORDER if turn == 0 else PAIRED:
                    cell = f"{link}-{name.replace(' ', '-')}-{turn}"
                    make = partial(_timed, bench, cluster, link, name)
                    row = _within(bench, cell, make, until - COSTS_S[link])
                    told[link][name] += [row] if row else []
                    left += row is None
    complete(left)
    ratios = [
        theirs["step_s"] / median(ours["step_s"]["cycling"])
        for ours, theirs in zip(told["1gbit"]["daso"], told["1gbit"]["ddp"], strict=True)
    ]
    spans = spread(ratios) if len(ratios) > 1 else None
    tables = timings(told)
    publish("slow_link", "measured", ratio=median(ratios), spread=spans, quick=quick, **tables)


def _within(bench: Bench, cell: str, make: Callable[[], Row], until: float) -> Row | None:
    """Return what a cell tells, None where it is not there and too late to begin."""
    if not bench.has(cell) and time.monotonic() > until:
        return None
    return bench.kept(cell, make)


def _timed(bench: Bench, cluster: Hosts, link: str, name: str) -> Row:
    """Return the seconds of steps by phase, and what one run sent between the hosts."""
    cluster.shape(None if link == "unshaped" else link)
    if name == "ddp":
        return cluster.peer("linked", ROWS, rounds(name), SEGMENTS - 1)
    before = cluster.sent()
    told = bench.started(timed(name), cluster.start)
    sent = {"interface_bytes": cluster.sent() - before}
    seconds = {"step_s": steps(name, told), "changes_s": changes(name, told)}
    return {**seconds, **counted(told), **sent}


if __name__ == "__main__":
    main()
