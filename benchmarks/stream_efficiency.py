"""Efficiency of a streaming pipeline of eight sleeping stages, over torch's 1F1B.

`ratio` = our `efficiency` over the peer's, as the median of the pairs; above 1 ours is better.
`spread` = its range.

Set-up: every layer sleeps 20 ms forward and 40 ms backward, so that eight ranks fit on two cores.
The sleep is a layer of user code, and no input gradient is needed. `stream`, `mono-forward`,
8 blocks of one layer, updates of 8 micro-batches, one segment of 30 updates (240 micro-batches).
Peer: torch 1F1B over gloo, 8 micro-batches, the same sleeps, its own stage alone over its step.

`efficiency` = (time of an update of one stage alone: the same layer, by the same program, on one
rank) over (time of an update in the steady state). The steady state is a difference: one run has a
segment of 30 updates and one of 5, which fill and drain in the same way, so 25 updates (200
micro-batches) take exactly T(30) - T(5). `efficiency_with_fill` is over the whole T(30). The stage
alone is measured by the same difference.

    python benchmarks/stream_efficiency.py [--quick]

Label: emulated.
"""

from __future__ import annotations

from statistics import median

from bench import Bench, RunResult, alternate, medians, parse_quick, run_peer, spread
from record import publish

from dtrain.schema import Table

STAGES, MICROS, ROWS, WIDTH = 8, 8, 4, 16
FORWARD_S, BACKWARD_S = 0.02, 0.04
LONG, SHORT = 30, 5
STEPS = 8


def main() -> None:
    """Measure pairs and publish the record."""
    quick = parse_quick(__doc__)
    bench = Bench("stream_efficiency", quick)
    ours, theirs = alternate(
        5,
        lambda number: bench.cached(f"ours-{number}", lambda: measure_ours(bench)),
        lambda number: bench.cached(f"peer-{number}", lambda: measure_peer(2 if quick else STEPS)),
    )
    ratios = [a["efficiency"] / b["efficiency"] for a, b in zip(ours, theirs, strict=True)]
    publish(
        "stream_efficiency", "emulated", medians(ours), medians(theirs), median(ratios),
        spread(ratios), quick=quick,
    )  # fmt: skip


def measure_ours(bench: Bench) -> dict[str, float]:
    """Return the figures of one run on eight ranks and one run of a single layer."""
    alone, pipeline = bench.train(make_run(1), 1), bench.train(make_run(STAGES), STAGES)
    alone_s, update_s = update_seconds(alone), update_seconds(pipeline)
    return {
        "efficiency": alone_s / update_s,
        "efficiency_with_fill": alone_s * LONG / pipeline.segment_seconds()[0],
        "update_s": update_s,
        "update_alone_s": alone_s,
    }


def update_seconds(result: RunResult) -> float:
    """Return the seconds per update in the steady state, without fill and drain."""
    long_s, short_s = result.segment_seconds()
    return (long_s - short_s) / (LONG - SHORT)


def make_run(stages: int) -> Table:
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


def measure_peer(steps: int) -> dict[str, float]:
    """Return the figures of torch's 1F1B."""
    return run_peer("sleep_1f1b", STAGES, MICROS, steps, FORWARD_S, BACKWARD_S)


if __name__ == "__main__":
    main()
