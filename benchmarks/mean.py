"""The mean of 40 MB over two ranks of one host against the library's own all-reduce.

Measured: `Comm.mean_` of one float32 tensor of 40 MB, and MPI's blocking `Allreduce` with a product
after it, in turns inside one program on two ranks. `ratio` = our seconds over the library's, the
median over the pairs; below 1 ours is faster. `spread` = its range. `small_mean_s` is a mean of
4 KiB, `round_trip_s` a message of 64 bytes there and back, over `Comm` and over blocking MPI.

    python benchmarks/mean.py [--quick]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench import asked, ranked, spread
from record import publish

from dtrain.comm import world

RANKS, WORDS, FEW, TIMES = 2, 10_000_000, 1024, 20
WORKER = "--worker"


def main() -> None:
    """Start the ranks and publish what they tell."""
    quick = asked(__doc__)
    told = ranked(RANKS, Path(__file__).resolve(), WORKER, 11 if quick else 51)
    ratios = told.pop("ratios")
    ours = {key.removeprefix("our_"): v for key, v in told.items() if key.startswith("our_")}
    theirs = {key.removeprefix("mpi_"): v for key, v in told.items() if key.startswith("mpi_")}
    publish("mean", "measured", ours, theirs, median(ratios), spread(ratios), quick=quick)


def work(pairs: int) -> None:
    """Measure on one rank; rank 0 prints."""
    comm = world()  # MPI before torch
    import torch
    from mpi4py import MPI

    own = MPI.COMM_WORLD.Dup()
    other = 1 - comm.rank

    def mean(tensor: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
        data = tensor.numpy()

        def library() -> None:
            own.Allreduce(MPI.IN_PLACE, data)
            tensor.mul_(0.5)

        return lambda: comm.mean_([tensor]), library

    small = torch.zeros(16)
    comm.post_recv(other, 0, [((16,), torch.float32)] * (TIMES * (pairs + 2)))

    def ping() -> None:
        if comm.rank == 0:
            comm.isend(small, other, 0)
        comm.recv(other, 0)
        if comm.rank:
            comm.isend(small, other, 0)

    def blocking() -> None:
        buffer = small.numpy()
        for turn in (0, 1):
            if comm.rank == turn:
                own.Send(buffer, other, 1)
            else:
                own.Recv(buffer, other, 1)

    def timed(call: Callable[[], object], times: int) -> float:
        own.Barrier()
        start = time.perf_counter()
        for _ in range(times):
            call()
        own.Barrier()
        return (time.perf_counter() - start) / times

    torch.set_num_threads(1)
    names = {"mean_s": mean(torch.ones(WORDS)), "small_mean_s": mean(torch.ones(FEW))}
    names["round_trip_s"] = ping, blocking
    told: dict[str, float | list[float]] = {}
    for name, calls in names.items():
        times = 1 if name == "mean_s" else TIMES
        rows = [[timed(call, times) for call in calls] for _ in range(pairs + 2)][2:]
        told |= {
            f"our_{name}": median(a for a, _ in rows),
            f"mpi_{name}": median(b for _, b in rows),
        }
        if name == "mean_s":
            told["ratios"] = [a / b for a, b in rows]
    comm.flush()
    if comm.rank == 0:
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        work(int(sys.argv[2]))
    else:
        main()
