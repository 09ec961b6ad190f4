"""Seconds of a step of two replicas of an MLP of 37.8 MB, over torch DDP.

`ratio` = seconds of our step over those of the peer's, the median of the pairs; below 1 ours is
faster. `spread` = its range.

Set-up: MLP 3072-1024x7-10 on 2 ranks, one thread each, 128 samples per rank, `backprop`, one block,
`every-step`, SGD with momentum 0.9 on both sides. Peer: torch DDP over gloo, the fastest of its
defaults, `gradient_as_bucket_view` and that with `static_graph`, chosen anew in every pair.

    python benchmarks/data_parallel_step.py [--quick]

Label: measured.
"""

from __future__ import annotations

from statistics import median

from bench import Bench, alternate, medians, parse_quick, run_peer, spread
from record import publish

from dtrain.schema import Table

RANKS, ROWS, INPUTS, WIDTHS = 2, 128, 3072, [1024] * 7


def main() -> None:
    """Measure pairs and publish the record."""
    quick = parse_quick(__doc__)
    bench, steps = Bench("data_parallel_step", quick), 10 if quick else 30

    def ours() -> dict[str, float]:
        result = bench.train(run(steps), RANKS)
        return {
            "step_s": RANKS * ROWS / result.samples_per_s(),
            "busy": result.summary["utilisation"][0],
        }

    our_rows, peer_rows = alternate(
        5,
        lambda number: bench.cached(f"ours-{number}", ours),
        lambda number: bench.cached(f"peer-{number}", lambda: run_peer("ddp", RANKS, ROWS, steps)),
    )
    ratios = [a["step_s"] / b["step_s"] for a, b in zip(our_rows, peer_rows, strict=True)]
    figures, peer_figures = medians(our_rows), medians(peer_rows)
    publish(
        "data_parallel_step",
        "measured",
        figures,
        peer_figures,
        median(ratios),
        spread(ratios),
        quick=quick,
    )


def run(steps: int) -> Table:
    """Return the run file: four segments of `steps` updates, of which the first warms up."""
    batch = RANKS * ROWS
    data = {"rows": batch * steps * 4, "width": INPUTS}
    return {
        "updates": steps * 4,
        "segment": steps,
        "batch-size": batch,
        "data": {"name": "user:noise", "normalise": False, **data},
        "model": {"name": "mlp", "widths": WIDTHS},
        "mesh": {"stages": 1},
        "partition": {"blocks": 1},
        "objective": {"name": "backprop"},
        "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    }


if __name__ == "__main__":
    main()
