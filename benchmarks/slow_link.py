"""Seconds of a training step over a slow network for every sync, over torch DDP.

`ratio` = step time of torch DDP over that of `daso` while it cycles, at 1 Gbit, the median of the
pairs; above 1 `daso` is faster. `spread` = its range.

Set-up: two Slurm hosts on two cores, two ranks each (twice oversubscribed), 32 samples per rank;
links of 1 Gbit, of 100 Mbit and without a limit. MLP 3072-1024x7-10 of 9.4 million parameters
(37.8 MB), `backprop`, one block, SGD with momentum 0.9. Peer: torch DDP over gloo at the fastest of
four settings (`peers/ddp_hosts.py`), chosen anew in each repetition.

Step times are medians by phase of a strategy over segments of whole rounds, at least 24 steps of
each phase; for `ab` and `oialr` also the time of a change of rank. At 1 Gbit `every-step`, `daso`
and the peer alternate five times and the others run once. At the other rates all run once. The time
of `oialr` is that at its initial ranks, an upper bound.

`figures` has step times, `peer` DDP's for each of them. `links` has, by rate and strategy, step
times, the counted bytes between the hosts and the bytes that their interfaces sent, headers
included. `ddp` has all measurements of the peer. `slow_link_accuracy` computes times to accuracy
from this record.

    python benchmarks/slow_link.py [--quick]

Label: measured. Time: starts of at most 35 minutes; each prints how many cells are left, and the
start that finishes the last cell writes the record. `--quick`: one repetition at 1 Gbit. Needs the
packages that `tests/cluster` needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

from bench import Bench, exit_if_incomplete, parse_quick, spread
from hosts import Hosts, start_hosts
from phases import Row, change_seconds, counted_bytes, step_seconds, timing_tables
from record import publish
from strategies import (
    NODES,
    RANKS_PER_NODE,
    ROWS,
    SEGMENTS,
    STRATEGIES,
    segment_updates,
    timing_run,
)

BUDGET_S = 34 * 60
REPETITIONS = {"1gbit": 5, "100mbit": 1, "unshaped": 1}
"""Repetitions of the strategies in `PAIRED` by rate of the links; all others run once."""
PAIRED = ("every-step", "daso", "ddp")
COSTS_S = {"1gbit": 120.0, "100mbit": 480.0, "unshaped": 60.0}
"""Most seconds of a cell on a quiet machine; it does not start if less time is left."""
ORDER = (*PAIRED, *(name for name in STRATEGIES if name not in PAIRED))


def main() -> None:
    """Measure the cells that are missing; publish the record when none is."""
    quick = parse_quick(__doc__)
    bench, until = Bench("slow_link", quick), time.monotonic() + BUDGET_S
    repetitions = {"1gbit": 1} if quick else REPETITIONS
    rows: dict[str, dict[str, list[Row]]] = {link: {n: [] for n in ORDER} for link in repetitions}
    missing = 0
    with start_hosts(NODES, RANKS_PER_NODE) as hosts:
        for link, count in repetitions.items():
            for number in range(count):
                for name in ORDER if number == 0 else PAIRED:
                    cell = f"{link}-{name.replace(' ', '-')}-{number}"
                    measure = partial(measure_cell, bench, hosts, link, name)
                    row = measure_before(until - COSTS_S[link], bench, cell, measure)
                    rows[link][name] += [row] if row else []
                    missing += row is None
    exit_if_incomplete(missing)
    ratios = [
        theirs["step_s"] / median(ours["step_s"]["cycling"])
        for ours, theirs in zip(rows["1gbit"]["daso"], rows["1gbit"]["ddp"], strict=True)
    ]
    ratio_range = spread(ratios) if len(ratios) > 1 else None
    tables = timing_tables(rows)
    publish(
        "slow_link", "measured", ratio=median(ratios), spread=ratio_range, quick=quick, **tables
    )


def measure_before(until: float, bench: Bench, cell: str, measure: Callable[[], Row]) -> Row | None:
    """Return the row of a cell; None if it is not cached and `until` has passed."""
    if not bench.has(cell) and time.monotonic() > until:
        return None
    return bench.cached(cell, measure)


def measure_cell(bench: Bench, hosts: Hosts, link: str, name: str) -> Row:
    """Return the seconds of steps by phase, and the bytes that one run sends between hosts."""
    hosts.set_rate(None if link == "unshaped" else link)
    if name == "ddp":
        return hosts.run_peer("ddp_hosts", ROWS, segment_updates(name), SEGMENTS - 1)
    before = hosts.bytes_sent()
    result = bench.train_with(hosts.run, timing_run(name))
    sent = {"interface_bytes": hosts.bytes_sent() - before}
    seconds = {
        "step_s": step_seconds(name, result),
        "changes_s": change_seconds(name, result),
    }
    return {**seconds, **counted_bytes(result), **sent}


if __name__ == "__main__":
    main()
