"""Utilisation of asynchronous backpropagation on four and eight ranks, over torch's 1F1B.

`ratio` = seconds per micro-batch of torch's 1F1B with M = 8 over those of ours, the slower of
`pipelined` and `pipedream`, at P = 8, as the median of the pairs; above 1 ours is faster. `spread`
= its range.

Set-up: every layer sleeps 50 ms forward and 100 ms backward (see `user.py`), so that eight ranks
fit on two cores. `backprop`, P blocks of one layer on P ranks, an update after every micro-batch of
4 rows, SGD with momentum. `pipelined` runs with weight prediction (LWP-v) and spike compensation,
`pipedream` with its stash. Peer: torch 1F1B over gloo with the same sleeps, M = 8 and 32
micro-batches per step; `1f1b_P_M` = its stage alone over its step.

`NAME_P` = (time of an update of one stage alone: the same layer, by the same program, on one rank)
over (time of an update in the steady state). This is the share of the bound, which is one
micro-batch in the time of the slowest stage. The steady state is a difference: a run has two
segments of 50 updates and one of 20, which fill and drain in the same way, so 30 updates take
exactly T(50) - T(20); the first segment warms up. The stage alone is measured by the same
difference; the record holds it in `micro_s`, and it exceeds the 150 ms of sleep by the time of
engine and autograd. `micro_s` holds all seconds per micro-batch, `busy` the busy share per stage
from the run.

    python benchmarks/pipeline_utilisation.py [--quick]

Label: emulated. `--quick`: P = 4 alone, and one pair.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from bench import Bench, RunResult, alternate, medians, parse_quick, run_peer, spread
from record import publish

from dtrain.schema import Table

RANKS, MICROS, PAIRS = (4, 8), (8, 32), 3
ROWS, WIDTH = 4, 16
FORWARD_S, BACKWARD_S = 0.05, 0.1
LONG, SHORT = 50, 20
STEPS = {8: 8, 32: 3}
BOTH = {"prediction": "velocity", "compensation": "spike"}
SCHEDULES: dict[str, Table] = {
    "pipelined": {"name": "pipelined"} | BOTH,
    "pipedream": {"name": "pipedream"},
}
Row = dict[str, Any]


def main() -> None:
    """Measure pairs and publish the record."""
    quick = parse_quick(__doc__)
    bench = Bench("pipeline_utilisation", quick)
    rank_counts = RANKS[:1] if quick else RANKS
    ours, theirs = alternate(
        1 if quick else PAIRS,
        lambda number: bench.cached(f"ours-{number}", lambda: measure_ours(bench, rank_counts)),
        lambda number: bench.cached(f"peer-{number}", lambda: measure_peer(rank_counts)),
    )
    largest = rank_counts[-1]
    ratios = [
        b[f"micro_s_{largest}_8"] / max(a["micro_s"][f"{name}_{largest}"] for name in SCHEDULES)
        for a, b in zip(ours, theirs, strict=True)
    ]
    figures = medians([row["shares"] for row in ours])
    details = {key: medians([row[key] for row in ours]) for key in ("micro_s", "busy")}
    ratio_range = spread(ratios) if len(ratios) > 1 else None
    publish(
        "pipeline_utilisation", "emulated", figures, medians(theirs), median(ratios), ratio_range,
        quick=quick, **details,
    )  # fmt: skip


def measure_ours(bench: Bench, rank_counts: tuple[int, ...]) -> Row:
    """Return the figures of one round of our schedules."""
    alone_s = update_seconds(bench.train(make_run("pipelined", 1), 1))
    row: Row = {"shares": {}, "micro_s": {"alone": alone_s}, "busy": {}}
    for ranks in rank_counts:
        for name in SCHEDULES:
            result = bench.train(make_run(name, ranks), ranks)
            row["micro_s"][f"{name}_{ranks}"] = update_seconds(result)
            row["shares"][f"{name}_{ranks}"] = alone_s / update_seconds(result)
            row["busy"][f"{name}_{ranks}"] = min(result.summary["utilisation"])
    return row


def update_seconds(result: RunResult) -> float:
    """Return the seconds per update in the steady state, without fill and drain."""
    _, long_s, short_s = result.segment_seconds()
    return (long_s - short_s) / (LONG - SHORT)


def make_run(name: str, stages: int) -> Table:
    """Return the run file of `stages` layers, one block and one rank each."""
    updates = 2 * LONG + SHORT
    data = {"rows": ROWS * updates, "width": WIDTH, "classes": WIDTH, "tests": WIDTH}
    times = {"forward-s": FORWARD_S, "backward-s": BACKWARD_S}
    return {
        "updates": updates,
        "segment": LONG,
        "batch-size": ROWS,
        "data": {"name": "user:noise", "normalise": False, **data},
        "model": {"name": "user:sleepers", "layers": stages, "width": WIDTH, **times},
        "mesh": {"stages": stages},
        "partition": {"blocks": stages},
        "objective": {"name": "backprop"},
        "schedule": SCHEDULES[name],
        "optimizer": {"name": "sgd", "lr": 1e-4, "momentum": 0.9},
    }


def measure_peer(rank_counts: tuple[int, ...]) -> dict[str, float]:
    """Return the figures of torch's 1F1B."""
    figures = {}
    for ranks in rank_counts:
        for micros in MICROS:
            result = run_peer("sleep_1f1b", ranks, micros, STEPS[micros], FORWARD_S, BACKWARD_S)
            figures[f"1f1b_{ranks}_{micros}"] = result["efficiency"]
            figures[f"micro_s_{ranks}_{micros}"] = result["update_s"] / micros
    return figures


if __name__ == "__main__":
    main()
