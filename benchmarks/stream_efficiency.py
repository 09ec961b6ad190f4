"""Eight stages whose devices sleep: how much of the time does a streaming pipeline work?

Emulated: every layer sleeps 20 ms forward and 40 ms backward (no input gradient is asked for, the
sleep is a layer of the user's), so that eight ranks fit on two cores. `stream`, `mono-forward`,
8 blocks of one layer, updates of 8 micro-batches, one segment of 30 updates (240 micro-batches).

`efficiency` = (one stage's update alone: the same layer by the same program on one rank) over (an
update in the steady state). The steady state is a difference: one run has a segment of 30 updates
and one of 5, both filled and drained alike, so 25 updates (200 micro-batches) cost exactly
T(30) - T(5), with nothing cut out by hand. `efficiency_with_fill` is over the whole T(30). The
same difference makes the update alone. Peer: torch 1F1B over gloo, 8 micro-batches, the same
sleeps, its own stage alone over its step. `ratio` = our `efficiency` over the peer's, the median
of the pairs; `spread` = its range.

    python benchmarks/stream_efficiency.py [--quick]
"""

from __future__ import annotations

from statistics import median

from bench import Bench, Told, asked, middle, peer, spread, turns
from record import publish

from dtrain.schema import Table

STAGES, MICROS, ROWS, WIDTH = 8, 8, 4, 16
FORWARD_S, BACKWARD_S = 0.02, 0.04
LONG, SHORT = 30, 5
STEPS = 8


def main() -> None:
    """Measure pairs and publish the record."""
    quick = asked(__doc__)
    bench = Bench("stream_efficiency", quick)
    ours, theirs = turns(
        5,
        lambda number: bench.kept(f"ours-{number}", lambda: figures(bench)),
        lambda number: bench.kept(f"peer-{number}", lambda: other(2 if quick else STEPS)),
    )
    ratios = [a["efficiency"] / b["efficiency"] for a, b in zip(ours, theirs, strict=True)]
    own, others = middle(ours), middle(theirs)
    publish(
        "stream_efficiency", "emulated", own, others, median(ratios), spread(ratios), quick=quick
    )


def figures(bench: Bench) -> dict[str, float]:
    """Return what one run on eight ranks and one run of a single layer tell."""
    alone, told = bench.train(run(1), 1), bench.train(run(STAGES), STAGES)
    update_s = steady(alone)
    return {
        "efficiency": update_s / steady(told),
        "efficiency_with_fill": update_s * LONG / told.walls()[0],
        "update_s": steady(told),
        "update_alone_s": update_s,
    }


def steady(told: Told) -> float:
    """Return the seconds of an update, fill and drain apart."""
    whole, part = told.walls()
    return (whole - part) / (LONG - SHORT)


def run(stages: int) -> Table:
    """Return the run file of `stages` layers, one block and one rank each."""
    batch, updates = MICROS * ROWS, LONG + SHORT
    data = {"rows": batch * updates, "width": WIDTH, "classes": WIDTH, "tests": WIDTH}
    times = {"forward-s": FORWARD_S, "backward-s": BACKWARD_S}
    return {
        "updates": updates,
        "segment": LONG,
        "batch-size": batch,
        "micro-batches": MICROS,
        "data": {"name": "user:noise", "normalise": False, **data},
        "model": {"name": "user:sleepers", "layers": stages, "width": WIDTH, **times},
        "mesh": {"stages": stages},
        "partition": {"blocks": stages},
        "objective": {"name": "mono-forward"},
        "schedule": {"name": "stream"},
        "optimizer": {"name": "sgd", "lr": 0.01},
    }


def other(steps: int) -> dict[str, float]:
    """Return the figures of torch 1F1B."""
    return peer("sleep", STAGES, MICROS, steps, FORWARD_S, BACKWARD_S)


if __name__ == "__main__":
    main()
