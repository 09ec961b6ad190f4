"""Throughput of the other ranks while one rank is late: `stream-replay` against `stream`.

`ratio` = gain under `stream-replay` over gain under `stream`, the median over pairs, where one rank
is late all the time; `spread` = its range. The gain is the rate of the slowest rank that is not
late, in micro-batches per second, over the rate of the late rank in the same run: load of the
machine slows both.

Four ranks, one block each, whose forwards sleep 20 ms; Mono-Forward, one segment. Rank 1 is late:

* `always`: it sleeps 100 ms more in every forward; patience 0.
* `sometimes`: it sleeps 1 s more in every 25th forward; patience 0.1 s.

`figures` has the micro-batches per second of each rank, from its first forward to its last, and the
mean `staleness` and `left_out` of each block; `peer` the same of `stream`.

    python benchmarks/replay_straggler.py [--quick]

Label: emulated. Time: about 3 minutes; `--quick`: one pair.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from bench import Bench, alternate, medians, parse_quick, spread
from record import publish

from dtrain.schema import Table

PAIRS = 5
RANKS = 4
LATE = 1
UPDATES = 100
CASES: dict[str, dict[str, float]] = {
    "always": {"late-s": 0.1, "every": 1, "patience-s": 0.0},
    "sometimes": {"late-s": 1.0, "every": 25, "patience-s": 0.1},
}


def main() -> None:
    """Run both schedules in turns."""
    quick = parse_quick(__doc__)
    bench = Bench("replay_straggler", quick)
    ours, peer = alternate(
        1 if quick else PAIRS,
        lambda pair: measure(bench, "stream-replay"),
        lambda pair: measure(bench, "stream"),
    )
    ratios = [gain(a) / gain(b) for a, b in zip(ours, peer, strict=True)]
    publish(
        "replay_straggler", "emulated", medians(ours), medians(peer), median(ratios),
        spread(ratios), quick=quick,
    )  # fmt: skip


def measure(bench: Bench, schedule: str) -> dict[str, float]:
    """Return the figures of all cases under a schedule."""
    figures: dict[str, float] = {}
    for case, settings in CASES.items():
        for name, value in measure_case(bench, schedule, case, settings).items():
            figures[f"{case} {name}"] = value
    return figures


def measure_case(
    bench: Bench, schedule: str, case: str, settings: dict[str, float]
) -> dict[str, float]:
    """Train one segment on four ranks; return rates by rank, and staleness by block."""
    subfolder = f"{schedule}-{case}"
    folder = bench.folder / subfolder
    for path in folder.glob("times-*.txt"):
        path.unlink()
    result = bench.train(make_run(schedule, settings), RANKS, subfolder=subfolder)
    figures = {}
    for rank in range(RANKS):
        lines = (folder / f"times-{rank}.txt").read_text(encoding="utf-8").split()
        times = [float(line) for line in lines][-UPDATES:]
        figures[f"rate rank {rank}"] = (len(times) - 1) / (times[-1] - times[0])
    record: dict[str, Any] = result.train_records[-1]
    for name in ("staleness", "left_out"):
        for block, value in enumerate(record.get(name) or ()):
            if value is not None:
                figures[f"{name} block {block}"] = value
    figures["loss"] = record["loss"][-1]
    return figures


def make_run(schedule: str, settings: dict[str, float]) -> Table:
    """Return the run file."""
    chosen: Table = {"name": schedule}
    if schedule == "stream-replay":
        chosen["patience-s"] = settings["patience-s"]
    late = {"late": LATE, "late-s": settings["late-s"], "every": int(settings["every"])}
    return {
        "epochs": 1,
        "batch-size": 8,
        "data": {"name": "user:noise", "rows": 8 * UPDATES, "width": 64},
        "model": {"name": "user:late_stages", "width": 64, "seconds": 0.02, **late},
        "partition": {"cuts": [1, 2, 3]},
        "objective": {"name": "mono-forward"},
        "schedule": chosen,
        "optimizer": {"name": "adam", "lr": 1e-3},
    }


def gain(figures: dict[str, float]) -> float:
    """Return the rate of the slowest other rank over that of the rank that is late all the time."""
    rates = [figures[f"always rate rank {rank}"] for rank in range(RANKS)]
    late = rates.pop(LATE)
    return min(rates) / late


if __name__ == "__main__":
    main()
