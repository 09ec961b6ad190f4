"""Backpropagation without a flush: how busy are four, and eight, devices that sleep?

Emulated: every layer sleeps 50 ms forward and 100 ms backward (see `user.py`), so that eight ranks
fit on two cores. `backprop`, P blocks of one layer on P ranks, an update after every micro-batch of
4 rows. `pipelined` with velocity prediction and spike compensation, and `pipedream` with its stash,
each with SGD and momentum.

`NAME_P` = (one stage's update alone: the same layer by the same program on one rank) over (an
update in the steady state): the share of the bound, which is one micro-batch in the time that the
slowest stage takes for it. The steady state is a difference: a run has two segments of 50 updates
and one of 20, all filled and drained alike, so 30 updates cost exactly T(50) - T(20); the first
segment warms up. The same difference makes the update alone, which the record holds in
`micro_s`: over the 150 ms of sleep, it has what engine and autograd take.

Peer: torch 1F1B over gloo with the same sleeps, M = 8 and 32 micro-batches a step; `1f1b_P_M` = its
stage alone over its step. `ratio` = seconds of a micro-batch in torch's 1F1B with M = 8 over those
of ours, the slower of the two schedules, at P = 8, the median of the pairs; `spread` = its range.
`micro_s` holds all seconds of a micro-batch, `busy` the busy share per stage as the run tells it.

    python benchmarks/pipeline_utilisation.py [--quick]

`--quick`: P = 4 alone, and one pair.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from bench import Bench, Told, asked, middle, peer, spread, turns
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
    quick = asked(__doc__)
    bench, sizes = Bench("pipeline_utilisation", quick), RANKS[:1] if quick else RANKS
    ours, theirs = turns(
        1 if quick else PAIRS,
        lambda number: bench.kept(f"ours-{number}", lambda: mine(bench, sizes)),
        lambda number: bench.kept(f"peer-{number}", lambda: others(sizes)),
    )
    most = sizes[-1]
    ratios = [
        b[f"micro_s_{most}_8"] / max(a["micro_s"][f"{name}_{most}"] for name in SCHEDULES)
        for a, b in zip(ours, theirs, strict=True)
    ]
    figures = middle([row["shares"] for row in ours])
    told = {key: middle([row[key] for row in ours]) for key in ("micro_s", "busy")}
    wide = spread(ratios) if len(ratios) > 1 else None
    publish(
        "pipeline_utilisation", "emulated", figures, middle(theirs), median(ratios), wide,
        quick=quick, **told,
    )  # fmt: skip


def mine(bench: Bench, sizes: tuple[int, ...]) -> Row:
    """Return what one round of ours tells."""
    alone = steady(bench.train(run("pipelined", 1), 1))
    row: Row = {"shares": {}, "micro_s": {"alone": alone}, "busy": {}}
    for ranks in sizes:
        for name in SCHEDULES:
            told = bench.train(run(name, ranks), ranks)
            row["micro_s"][f"{name}_{ranks}"] = steady(told)
            row["shares"][f"{name}_{ranks}"] = alone / steady(told)
            row["busy"][f"{name}_{ranks}"] = min(told.summary["utilisation"])
    return row


def steady(told: Told) -> float:
    """Return the seconds of an update, fill and drain apart."""
    _, whole, part = told.walls()
    return (whole - part) / (LONG - SHORT)


def run(name: str, stages: int) -> Table:
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


def others(sizes: tuple[int, ...]) -> dict[str, float]:
    """Return the figures of torch 1F1B."""
    found = {}
    for ranks in sizes:
        for micros in MICROS:
            told = peer("sleep", ranks, micros, STEPS[micros], FORWARD_S, BACKWARD_S)
            found[f"1f1b_{ranks}_{micros}"] = told["efficiency"]
            found[f"micro_s_{ranks}_{micros}"] = told["update_s"] / micros
    return found


if __name__ == "__main__":
    main()
