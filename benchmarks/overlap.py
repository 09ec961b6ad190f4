"""Share of a mean of 37.8 MB that computation hides, over the mean before the computation.

`ratio` = (work alone + mean alone - both) / mean alone, between two hosts: the share of the mean
that the work hides, the median over the repetitions. `spread` = its range. Peer: the mean, then the
work.

Set-up: 2 ranks, one thread each, on two hosts joined by 1 Gbit, then on one host. The work is 50
pieces of 10 ms of matrix products; `Comm.progress` follows each, as the engine calls it after each
action. Timed alternately, from a common start to the end of the later rank: the work alone, the
mean alone, and both, with the mean started before the work and waited for after it. Inside one host
the cores that compute also copy, so nothing is hidden: `near_over_blocking` = both / (mean, then
work), at most 1 up to noise.

    python benchmarks/overlap.py [--quick]

Label: measured. Needs the packages that `tests/cluster` needs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench import last_record, parse_quick, run_on_ranks, spread
from record import ROOT, publish

from dtrain.comm import world

RATE, RANKS, ELEMENTS = "1gbit", 2, 9_450_000
PIECES, PIECE_S, SIDE = 50, 0.01, 256
WORKER = "--worker"
KINDS = "work_s", "mean_s", "both_s", "blocking_s"


def main() -> None:
    """Start the ranks, on two hosts and on one, and publish their measurements."""
    quick = parse_quick(__doc__)
    from hosts import start_hosts  # needs root and Slurm

    times = 5 if quick else 15
    script = Path(__file__).resolve()
    with start_hosts(RANKS, 1) as hosts:
        hosts.set_rate(RATE)
        command = [sys.executable, str(script), WORKER, str(times)]
        far = last_record(hosts.run(command, ROOT, capture=True))
    near = run_on_ranks(RANKS, script, WORKER, times)
    hidden_shares = [(row[0] + row[1] - row[2]) / row[1] for row in far["rows"]]
    figures = {
        **_median_figures("far", far),
        **_median_figures("near", near),
        "near_over_blocking": median(row[2] / row[3] for row in near["rows"]),
        "far_over_blocking": median(row[2] / row[3] for row in far["rows"]),
    }
    peer = {key: figures.pop(key) for key in ("far_blocking_s", "near_blocking_s")}
    publish(
        "overlap",
        "measured",
        figures,
        peer,
        median(hidden_shares),
        spread(hidden_shares),
        quick=quick,
    )


def _median_figures(name: str, result: dict[str, Any]) -> dict[str, float]:
    columns = zip(*result["rows"], strict=True)
    return {f"{name}_{kind}": median(column) for kind, column in zip(KINDS, columns, strict=True)}


def work(times: int) -> None:
    """Measure on one rank; rank 0 prints."""
    comm = world()  # MPI before torch
    import torch

    torch.set_num_threads(1)
    matrix, product = torch.randn(SIDE, SIDE), torch.empty(SIDE, SIDE)
    data = torch.ones(ELEMENTS)

    def multiply(count: int) -> None:
        for _ in range(count):
            torch.mm(matrix, matrix, out=product)

    def timed(call: Callable[[], object]) -> float:
        """Return the seconds from a common start to the end of the later rank."""
        comm.allgather_object(None)
        start = time.perf_counter()
        call()
        return float(max(comm.allgather_object(time.perf_counter() - start)))

    multiply(200)
    product_s = median(timed(lambda: multiply(20)) / 20 for _ in range(15))
    count = max(1, round(PIECE_S / product_s))

    def compute() -> None:
        for _ in range(PIECES):
            multiply(count)
            comm.progress()

    def both() -> None:
        mean = comm.imean_([data])
        compute()
        mean.wait()

    def blocking() -> None:
        comm.mean_([data])
        compute()

    calls = compute, lambda: comm.mean_([data]), both, blocking
    rows = [[timed(call) for call in calls] for _ in range(times + 1)][1:]
    if comm.rank == 0:
        print(json.dumps({"rows": rows}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        work(int(sys.argv[2]))
    else:
        main()
