"""Cost of a checkpoint every 100 updates of the CIFAR-10 MLP, over the same run without them.

`ratio` = seconds per update with asynchronous checkpoints over those without, the median of the
pairs; 1 means no cost. `spread` = its range. `bounds` holds the limits of the project, and
`within_bounds` whether each is kept.

Set-up: `jobs/cifar10.toml` (MLP 3072-1000-1000-1000-10 in three blocks, Mono-Forward, Adam, 128
samples per update) on two stages and two ranks, one thread each. Three runs alternate: without
checkpoints, with synchronous, and with asynchronous ones. The time of a run is that of its
segments and of the checkpoints between them; start, evaluation and the last checkpoint are left
out.

`sync_share`, `async_share`: additional time over that of the run without checkpoints.
`sync_stall_share`, `async_stall_share`: time in which the training stands still for checkpoints,
over the time of the same run. Other load on the machine changes the former more than the latter.
`write_share` = bytes per second of a synchronous checkpoint, hashes and agreement of the ranks
included, over those of the peer, which writes as many bytes by one `write` and one `fsync`.
`restart_ratio` = seconds from the command to the first update of a resumed run, over those of a
fresh one.

    python benchmarks/checkpoint_cost.py [--quick]

Label: measured. Reads `cifar10-jpeg.tar.gz` from ``DTRAIN_DATA`` (default ``../shared/data``).
"""

from __future__ import annotations

import json
import os
import shutil
import time
import tomllib
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench import DTRAIN, Bench, RunResult, cifar_paths, medians, parse_quick, run_program, spread
from record import ROOT, publish

from dtrain.schema import Table, dump_toml

RANKS, EVERY = 2, 100
KINDS = {"none": {}, "sync": {"every": EVERY}, "async": {"every": EVERY, "asynchronous": True}}
BOUNDS = {"sync_share": 0.02, "async_share": 0.005, "write_share": 0.7, "restart_ratio": 1.5}


def main() -> None:
    """Measure triples and restarts, and publish the record."""
    quick = parse_quick(__doc__)
    bench = Bench("checkpoint_cost", quick)
    base = run_table(*cifar_paths())
    updates, repetitions, restarts = (120, 1, 1) if quick else (390, 6, 3)
    rows = [
        bench.cached(f"triple-{n}", lambda: measure_triple(bench, base, updates))
        for n in range(repetitions)
    ]
    starts = [
        bench.cached(f"restart-{n}", lambda: measure_restart(bench.folder, base))
        for n in range(restarts)
    ]
    figures = medians([shares(row) for row in rows])
    figures |= {"restart_ratio": median(r["restart_s"] / r["fresh_s"] for r in starts)}
    figures |= {"restart_s": median(row["restart_s"] for row in starts)}
    peer = medians([{"update_s": r["none_s"], "write_mb_s": r["plain_mb_s"]} for r in rows])
    peer |= {"fresh_s": median(row["fresh_s"] for row in starts)}
    ratios = [row["async_s"] / row["none_s"] for row in rows]
    publish(
        "checkpoint_cost", "measured", figures, peer, median(ratios), spread(ratios),
        quick=quick, every=EVERY, updates=updates, bounds=BOUNDS,
        within_bounds={key: is_within(key, figures[key]) for key in BOUNDS},
    )  # fmt: skip


def is_within(key: str, value: float) -> bool:
    """Return whether a figure keeps its bound: a lower one for `write_share`, else an upper one."""
    return value >= BOUNDS[key] if key == "write_share" else value <= BOUNDS[key]


def run_table(train: str, test: str) -> Table:
    """Return the run file of `jobs/cifar10.toml` on two stages, without its length."""
    table = tomllib.loads((ROOT / "jobs" / "cifar10.toml").read_text(encoding="utf-8"))
    del table["epochs"]
    table["data"] |= {"train": train, "test": test}
    return table | {"mesh": {"stages": RANKS}}


def measure_triple(bench: Bench, base: Table, updates: int) -> dict[str, float]:
    """Train three runs, and write the bytes of a checkpoint plainly."""
    row: dict[str, float] = {}
    for kind, settings in KINDS.items():
        result = bench.train({"updates": updates, **base, "checkpoint": settings}, RANKS)
        records = checkpoint_records(bench.folder / "out")
        stalls = [r["save_s"] for r in records if r["update"] < updates]
        row[f"{kind}_s"] = (training_s(result) + sum(stalls)) / updates
        row[f"{kind}_stall_share"] = sum(stalls) / (training_s(result) + sum(stalls))
        if kind == "sync":
            size = checkpoint_bytes(bench.folder / "out")
            row["write_mb_s"] = size / 1e6 / median(r["save_s"] for r in records)
            row["plain_mb_s"] = size / 1e6 / plain_write_s(bench.folder / "plain", size)
    return row


def shares(row: dict[str, Any]) -> dict[str, float]:
    """Return the figures of one triple."""
    return {
        "sync_share": row["sync_s"] / row["none_s"] - 1,
        "async_share": row["async_s"] / row["none_s"] - 1,
        "sync_stall_share": row["sync_stall_share"],
        "async_stall_share": row["async_stall_share"],
        "write_mb_s": row["write_mb_s"],
        "write_share": row["write_mb_s"] / row["plain_mb_s"],
    }


def training_s(result: RunResult) -> float:
    """Return the seconds of all segments."""
    return sum(float(record["train_s"]) for record in result.train_records)


def checkpoint_records(out: Path) -> list[dict[str, Any]]:
    """Return the records of checkpoints."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "checkpoint"]


def checkpoint_bytes(out: Path) -> int:
    """Return the bytes of the newest checkpoint."""
    newest = max((out / "checkpoints").glob("update-*"))
    return sum(path.stat().st_size for path in newest.iterdir())


def plain_write_s(path: Path, size: int) -> float:
    """Return the seconds of one write of `size` bytes and one fsync, the median of five."""
    data, seconds = np.random.default_rng(0).bytes(size), []
    for _ in range(5):
        start = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        seconds.append(time.perf_counter() - start)
        path.unlink()
    return median(seconds)


def measure_restart(folder: Path, base: Table) -> dict[str, float]:
    """Return the seconds from the command to the first update, fresh and from a checkpoint."""
    (folder / "run.toml").write_text(dump_toml({"updates": 2, **base}), encoding="utf-8")
    shutil.rmtree(folder / "restart", ignore_errors=True)
    seconds = {}
    for number, kind in enumerate(["fresh_s", "restart_s"], start=1):
        start = time.time()
        command = [*DTRAIN, "train", "run.toml", "--out", "restart", "--ranks", str(RANKS)]
        run_program([*command, "--set", "threads=1", "--set", f"updates={number}"], folder, 1)
        text = (folder / "restart" / "metrics.jsonl").read_text(encoding="utf-8")
        train = [r for r in map(json.loads, text.splitlines()) if r["kind"] == "train"]
        seconds[kind] = train[-1]["unix_s"] - start
    return seconds


if __name__ == "__main__":
    main()
