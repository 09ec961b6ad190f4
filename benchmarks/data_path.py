"""Samples per second from a set that is larger than the memory, over those of a set in memory.

`ratio` = samples/s of a run that reads a 4.3 GB HDF5 set (350,000 images of 3 x 64 x 64 bytes in
chunks of 1 MB) with `shuffle = "chunks"` under a limit of 2 GB of memory, over those of the same
net on the first 20,000 images held in memory, under the same limit; the median of the pairs.
`spread` = its range. The net is an MLP of two hidden layers of 256, backprop, 128 samples per
update, one rank of one thread. The first segment of each run does not count.

Further figures:

- `statistics_over_read`: seconds in which one rank computes the statistics of the set at a start,
  over those of one plain sequential read of the file (`peers/plain_read.py`); both from the disk.
  `two_ranks_over_read`: the same for two ranks.
- `rss_minus_plan_mb`: largest resident memory of the run, over the planned memory of the rank, with
  the data that it holds and 250 MB for Python, torch and MPI.
- `items_over_dataloader`: samples/s of a torch Dataset with about 2 ms of work per item and
  `workers = 2`, over torch's DataLoader with two processes (`peers/dataloader.py`).
- `slow_disk_over_plain_loop`: seconds of an update whose reads take 15 ms (a sleep: emulated), over
  those of a plain loop that reads before it computes (`peers/slow_disk_loop.py`).
- `twelve_ranks_over_set`: growth of the proportional set sizes of 12 ranks on one node that read a
  set of 1 GB (floats, in chunks) in place of a tiny one, over the bytes of the set; once.

    python benchmarks/data_path.py [--quick]

Label: measured. Needs root for the limit of memory, and 5 GB of disk.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
from bench import (
    DTRAIN,
    PEERS,
    Bench,
    RunResult,
    alternate,
    last_record,
    parse_quick,
    run_on_ranks,
    run_peer,
    run_program,
    spread,
)
from memory_limit import drop_cached, memory_limit
from record import ROOT, publish

from dtrain.comm.launcher import find_mpirun, launch_command
from dtrain.schema import Table, dump_toml

LIMIT = 2 * 10**9
SHAPE, CHUNK = (3, 64, 64), 85
BATCH, SEGMENTS = 128, 5
WIDTH, READ_MS = 3000, 15.0


def main() -> None:
    """Measure and publish the record."""
    quick = parse_quick(__doc__)
    bench = Bench("data_path", quick)
    size, steps, pairs = (80_000, 40, 3) if quick else (350_000, 100, 5)
    disk, memory, test = write_sets(size)
    with memory_limit(LIMIT) as limited:
        train = [train_limited(bench, limited, path, test, steps) for path in (disk, memory)]
        ours, theirs = alternate(
            pairs,
            lambda number: bench.cached(f"disk-{number}", train[0]),
            lambda number: bench.cached(f"memory-{number}", train[1]),
        )
        planned = bench.cached("plan", lambda: plan_limited(bench, limited, disk, test, steps))
    start = [bench.cached(f"start-{n}", lambda: start_figures(disk, test)) for n in range(pairs)]
    items, loader = alternate(
        pairs,
        lambda number: bench.cached(f"items-{number}", lambda: train_items(bench)),
        lambda number: bench.cached(f"loader-{number}", read_by_dataloader),
    )
    ahead, plain = alternate(
        pairs,
        lambda number: bench.cached(f"ahead-{number}", lambda: train_slow_disk(bench)),
        lambda number: bench.cached(f"plain-{number}", read_slow_disk),
    )
    node = bench.cached("node", lambda: hold_on_one_node(128 if quick else 1000))
    ratios = [a["samples_per_s"] / b["samples_per_s"] for a, b in zip(ours, theirs, strict=True)]
    resident = max(row["rss_bytes"] for row in ours)
    figures = {
        "disk_samples_per_s": median(row["samples_per_s"] for row in ours),
        "statistics_s": median(row["statistics_s"] for row in start),
        "statistics_two_ranks_s": median(row["statistics_two_ranks_s"] for row in start),
        "statistics_over_read": median(row["statistics_s"] / row["read_s"] for row in start),
        "two_ranks_over_read": median(
            row["statistics_two_ranks_s"] / row["read_s"] for row in start
        ),
        "rss_mb": resident / 1e6,
        "planned_mb": planned["bytes"] / 1e6,
        "rss_minus_plan_mb": (resident - planned["bytes"]) / 1e6,
        "items_samples_per_s": median(row["samples_per_s"] for row in items),
        "items_over_dataloader": median(
            a["samples_per_s"] / b["samples_per_s"] for a, b in zip(items, loader, strict=True)
        ),
        "twelve_ranks_over_set": node["growth"],
        "slow_disk_update_s": median(row["update_s"] for row in ahead),
        "slow_disk_over_plain_loop": median(
            a["update_s"] / b["update_s"] for a, b in zip(ahead, plain, strict=True)
        ),
    }
    peer = {
        "memory_samples_per_s": median(row["samples_per_s"] for row in theirs),
        "read_s": median(row["read_s"] for row in start),
        "dataloader_samples_per_s": median(row["samples_per_s"] for row in loader),
        "slow_disk_plain_update_s": median(row["update_s"] for row in plain),
    }
    publish(
        "data_path", "measured", figures, peer, median(ratios), spread(ratios), quick=quick,
        set_bytes=size * int(np.prod(SHAPE)), limit_bytes=LIMIT,
    )  # fmt: skip


def write_sets(size: int) -> tuple[Path, Path, Path]:
    """Return a large set, its first 20,000 images and a test set; write those that are missing."""
    folder = ROOT / "runs" / "data_path"
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"set-{size}.h5", folder / "memory.h5", folder / "test.h5"
    for path, count in zip(paths, (size, 20_000, 512), strict=True):
        if not path.exists():
            draft = path.with_suffix(".part")
            write_set(draft, count)
            draft.rename(path)
    return paths


def write_set(path: Path, count: int) -> None:
    """Write random images, each class a little brighter than the one before."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        x = file.create_dataset("x", (count, *SHAPE), np.uint8, chunks=(CHUNK, *SHAPE))
        file["y"] = np.arange(count) % 10
        for start in range(0, count, CHUNK):
            rows = min(CHUNK, count - start)
            noise = rng.integers(0, 160, (rows, *SHAPE), dtype=np.uint8)
            classes = (np.arange(start, start + rows) % 10).astype(np.uint8)
            x[start : start + rows] = noise + 9 * classes[:, None, None, None]


def run_file(train: Path, test: Path, steps: int) -> Table:
    """Return the run file."""
    return {
        "updates": steps * SEGMENTS,
        "segment": steps,
        "batch-size": BATCH,
        "threads": 1,
        "data": {"name": "hdf5", "train": str(train), "test": str(test), "shuffle": "chunks"},
        "model": {"name": "mlp", "widths": [256, 256]},
        "partition": {"blocks": 1},
        "objective": {"name": "backprop"},
        "optimizer": {"name": "adam", "lr": 1e-3},
        "evaluate": {"every": 1000},
    }


def train_limited(bench: Bench, limited: list[str], train: Path, test: Path, steps: int) -> Any:
    """Return a function that trains under the limit, and returns speed and resident memory."""

    def measure() -> dict[str, float]:
        drop_cached([train])

        def start(command: list[str], folder: Path) -> None:
            run_program([*limited, *command], folder, 1)

        result: RunResult = bench.train_with(start, run_file(train, test, steps))
        rss = max(result.summary["rss_bytes"])
        return {"samples_per_s": result.samples_per_s(), "rss_bytes": float(rss)}

    return measure


def plan_limited(
    bench: Bench, limited: list[str], train: Path, test: Path, steps: int
) -> dict[str, float]:
    """Return what a plan under the limit counts for one rank: its peak, held data and buffers."""
    path = bench.folder / "plan.toml"
    path.write_text(dump_toml(run_file(train, test, steps)), encoding="utf-8")
    words = [*limited, *DTRAIN, "plan", str(path), "--json", "--ranks", "1"]
    plan = json.loads(run_program(words, bench.folder, 1, capture=True))
    held = [
        int(plan["data"][key])
        for key in ("node_bytes", "rank_bytes", "piece_bytes", "process_bytes")
    ]
    return {"bytes": float(plan["memory"][0]["peak_bytes"] + sum(held))}


def start_figures(train: Path, test: Path) -> dict[str, float]:
    """Return the seconds of the statistics on one and two ranks, and of a plain read."""
    script = ROOT / "benchmarks" / "statistics_pass.py"
    rows = {}
    for key, ranks in (("statistics_s", 1), ("statistics_two_ranks_s", 2)):
        drop_cached([train])
        rows[key] = run_on_ranks(ranks, script, train, test)["statistics_s"]
    drop_cached([train])
    words = [sys.executable, str(PEERS / "plain_read.py"), str(train)]
    rows["read_s"] = last_record(run_program(words, ROOT, 1, capture=True))["read_s"]
    return rows


def train_items(bench: Bench) -> dict[str, float]:
    """Return the samples/s of a run on a torch Dataset with two worker processes."""
    run = run_file(Path(), Path(), 20) | {
        "data": {"name": "user:slow_items", "samples": 20_000, "workers": 2, "normalise": False},
        "model": {"name": "mlp", "widths": [100]},
    }
    return {"samples_per_s": bench.train(run, 1).samples_per_s()}


def read_by_dataloader() -> dict[str, float]:
    """Return the samples/s of the peer."""
    return run_peer("dataloader", 1, 20_000, BATCH, 20, SEGMENTS, 2)


def hold_on_one_node(megabytes: int) -> dict[str, float]:
    """Return the growth of the memory of 12 ranks, over the size of the set that they hold."""
    folder = ROOT / "runs" / "data_path" / "node"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = ROOT / "tests" / "system" / "node_memory_ranks.py"
    launcher = find_mpirun(os.environ)
    assert launcher is not None, "make install"
    words = [sys.executable, str(script), str(folder), str(megabytes)]
    run_program(launch_command(launcher, 12, words), ROOT, 1)
    table = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return {"growth": (sum(table["large"]) - sum(table["tiny"])) / table["set_bytes"]}


def train_slow_disk(bench: Bench) -> dict[str, float]:
    """Return the seconds of an update that reads ahead from a slow disk."""
    keys = {"samples": 20_000, "width": WIDTH, "read-ms": READ_MS}
    run = run_file(Path(), Path(), 30) | {
        "data": {"name": "user:slow_disk", "normalise": False, **keys},
        "model": {"name": "mlp", "widths": [1000]},
    }
    return {"update_s": BATCH / bench.train(run, 1).samples_per_s()}


def read_slow_disk() -> dict[str, float]:
    """Return the seconds of an update of the peer."""
    return run_peer("slow_disk_loop", 1, 20_000, WIDTH, READ_MS, BATCH, 30, SEGMENTS)


if __name__ == "__main__":
    main()
