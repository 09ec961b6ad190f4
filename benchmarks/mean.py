"""Seconds of a mean of 40 MB over two ranks, over MPI's `Allreduce` followed by a product.

`ratio` = seconds of `Comm.mean_` over those of MPI, the median over the pairs; below 1 `mean_` is
faster. `spread` = its range.

Set-up: 2 ranks of one host, one float32 tensor of 40 MB, both sides alternately in one program.
`small_mean_s` is a mean of 4 KiB, `round_trip_s` a message of 64 bytes there and back, over `Comm`
and over blocking MPI.

    python benchmarks/mean.py [--quick]

Label: measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench import parse_quick, run_on_ranks, spread
from record import publish

from dtrain.comm import world

RANKS, LARGE, SMALL, TIMES = 2, 10_000_000, 1024, 20
WORKER = "--worker"


def main() -> None:
    """Start the ranks and publish their measurements."""
    quick = parse_quick(__doc__)
    times = run_on_ranks(RANKS, Path(__file__).resolve(), WORKER, 11 if quick else 51)
    ratios = times.pop("ratios")
    ours = {key.removeprefix("our_"): v for key, v in times.items() if key.startswith("our_")}
    theirs = {key.removeprefix("mpi_"): v for key, v in times.items() if key.startswith("mpi_")}
    publish("mean", "measured", ours, theirs, median(ratios), spread(ratios), quick=quick)


def work(pairs: int) -> None:
    """Measure on one rank; rank 0 prints."""
    comm = world()  # MPI before torch
    import torch
    from mpi4py import MPI

    library_comm = MPI.COMM_WORLD.Dup()
    other = 1 - comm.rank

    def mean(tensor: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
        data = tensor.numpy()

        def library() -> None:
            library_comm.Allreduce(MPI.IN_PLACE, data)
            tensor.mul_(0.5)

        return lambda: comm.mean_([tensor]), library

    message = torch.zeros(16)
    comm.post_recv(other, 0, [((16,), torch.float32)] * (TIMES * (pairs + 2)))

    def ping() -> None:
        if comm.rank == 0:
            comm.isend(message, other, 0)
        comm.recv(other, 0)
        if comm.rank:
            comm.isend(message, other, 0)

    def blocking_ping() -> None:
        buffer = message.numpy()
        for turn in (0, 1):
            if comm.rank == turn:
                library_comm.Send(buffer, other, 1)
            else:
                library_comm.Recv(buffer, other, 1)

    def timed(call: Callable[[], object], times: int) -> float:
        library_comm.Barrier()
        start = time.perf_counter()
        for _ in range(times):
            call()
        library_comm.Barrier()
        return (time.perf_counter() - start) / times

    torch.set_num_threads(1)
    calls = {
        "mean_s": mean(torch.ones(LARGE)),
        "small_mean_s": mean(torch.ones(SMALL)),
        "round_trip_s": (ping, blocking_ping),
    }
    result: dict[str, float | list[float]] = {}
    for name, pair in calls.items():
        times = 1 if name == "mean_s" else TIMES
        rows = [[timed(call, times) for call in pair] for _ in range(pairs + 2)][2:]
        result[f"our_{name}"] = median(ours for ours, _ in rows)
        result[f"mpi_{name}"] = median(theirs for _, theirs in rows)
        if name == "mean_s":
            result["ratios"] = [ours / theirs for ours, theirs in rows]
    comm.flush()
    if comm.rank == 0:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        work(int(sys.argv[2]))
    else:
        main()
