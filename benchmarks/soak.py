"""Growth of memory, open files, threads and requests of 4 ranks over 50,000 updates.

`ratio` = resident memory of all ranks after the last update over that after three fifths of the
updates, the larger of the two runs; 1 means no growth. `spread` = the difference of the two. The
peer is the same run after three fifths of its updates.

Set-up: net 64-32-32-10, random inputs in memory, 16 samples per update, 2 stages x 2 replicas, an
evaluation and a checkpoint every 1,000 updates, of which two are kept. The runs: `backprop` with
`1f1b` and `every-step`, 50,000 updates; `mono-forward` with `stream` and `local-sgd`, 10,000. Every
1,000 updates each rank reads its resident memory, open files, threads, Python objects, and its
messages in flight. `rank_growth_mb` is the growth of the rank that grows most; `samples` are sums.

    python benchmarks/soak.py [--quick]

Label: measured. Time: about 15 min; `--quick`, a tenth of the updates: 2 min.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

RANKS, SEGMENT = 4, 1000
BASE: dict[str, Any] = {
    "batch-size": 16,
    "micro-batches": 2,
    "threads": 1,
    "mesh": {"stages": 2},
    "data": {"name": "user:noise", "rows": 16 * SEGMENT, "width": 64},
    "model": {"name": "mlp", "widths": [32, 32]},
    "partition": {"blocks": 2},
    "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    "log": {"every-s": 1000},
}
RUNS: dict[str, dict[str, Any]] = {
    "1f1b": {
        "updates": 50_000,
        "objective": {"name": "backprop"},
        "schedule": {"name": "1f1b"},
    },
    "stream": {
        "updates": 10_000,
        "objective": {"name": "mono-forward"},
        "schedule": {"name": "stream"},
        "sync": {"name": "local-sgd", "every": 8},
    },
}
COUNTS = ("files", "threads", "requests", "objects")


def main() -> None:
    """Train both runs and publish the record."""
    if sys.argv[1:2] == ["--rank"]:
        return train_rank(Path(sys.argv[2]))
    from bench import Bench, parse_quick, run_on_ranks
    from record import publish

    quick = parse_quick(__doc__)
    bench, ours, peer = Bench("soak", quick), dict[str, float](), dict[str, float]()
    ratios, grown, samples = list[float](), dict[str, float](), dict[str, Any]()
    for name, changes in RUNS.items():
        updates = changes["updates"] // (10 if quick else 1)
        run = bench.write_run(BASE | changes | {"updates": updates}, name) / "run.toml"
        measure = partial(run_on_ranks, RANKS, __file__, "--rank", run)
        ranks = bench.cached(name, measure)["ranks"]
        early, late = (summed(ranks, at) for at in (early_update(updates), updates))
        peer |= {f"{name}_{key}": value for key, value in early.items()}
        ours |= {f"{name}_{key}": value for key, value in late.items()}
        grown[name] = max(growth(rank, early_update(updates), updates) for rank in ranks)
        steps = range(SEGMENT, updates + 1, 5 * SEGMENT)
        samples[name] = {step: summed(ranks, step) for step in steps}
        ratios.append(late["resident_mb"] / early["resident_mb"])
    publish(
        "soak", "measured", ours, peer, max(ratios), max(ratios) - min(ratios),
        quick=quick, rank_growth_mb=grown, samples=samples,
    )  # fmt: skip


def early_update(updates: int) -> int:
    """Return the update after which growth counts: three fifths, at the end of a segment."""
    return max(SEGMENT, updates * 3 // 5)


def summed(ranks: list[list[dict[str, float]]], update: int) -> dict[str, float]:
    """Return the sums over ranks after an update."""
    here = [next(row for row in rows if row["update"] == update) for rows in ranks]
    return {key: sum(row[key] for row in here) for key in ("resident_mb", *COUNTS)}


def growth(rows: list[dict[str, float]], first: int, last: int) -> float:
    """Return the growth of one rank between two updates, in MB."""
    by_update = {row["update"]: row["resident_mb"] for row in rows}
    return by_update[last] - by_update[first]


def train_rank(path: Path) -> None:
    """Train as one rank; rank 0 prints the measurements of all."""
    import dtrain

    comm, rows = dtrain.init(), list[dict[str, float]]()

    def sample(session: Any, event: Any) -> None:
        if event.kind == "segment":
            rows.append({"update": event.update, **measured(session)})

    out = path.parent / "out"
    if comm.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
    comm.allgather_object(None)
    dtrain.train(dtrain.Run.read(path), out, callbacks=[sample])
    ranks = comm.allgather_object(rows)
    if comm.rank == 0:
        print(json.dumps({"ranks": ranks}))


def measured(session: Any) -> dict[str, float]:
    """Return the resources of this process now."""
    gc.collect()
    proc = Path("/proc/self")
    pages = int((proc / "statm").read_text(encoding="utf-8").split()[1])
    pending = sum(1 for source in session.comm.flight.pending_sources for _ in source())
    return {
        "resident_mb": pages * resource.getpagesize() / 1e6,
        "files": len(os.listdir(proc / "fd")),
        "threads": len(os.listdir(proc / "task")),
        "requests": pending,
        "objects": len(gc.get_objects()),
    }


if __name__ == "__main__":
    main()
