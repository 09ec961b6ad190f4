"""Samples per second of ResNet-20 with DGL heads on two ranks, over dtrain on one rank.

`ratio` = samples per second of two ranks over those of one, the median of the pairs; `spread` = its
range. `bound` is the largest ratio that the cut allows: the sum of the blocks' multiply-adds over
the maximum (`dtrain plan --json`).

Set-up: the same run file on 2 ranks and on 1, one thread per rank, CIFAR-10, two blocks,
`local-head` with `head = "dgl"`, `stream`.

    python benchmarks/local_head_scaling.py [--quick]

Label: measured. Reads `cifar10-jpeg.tar.gz` from ``DTRAIN_DATA`` (default ``../shared/data``).
"""

from __future__ import annotations

from statistics import median

from bench import Bench, alternate, cifar_paths, medians, parse_quick, spread
from record import publish

from dtrain.schema import Table

RANKS, BATCH = 2, 128


def main() -> None:
    """Measure pairs and publish the record."""
    quick = parse_quick(__doc__)
    bench, steps = Bench("local_head_scaling", quick), 6 if quick else 20
    run = resnet(*cifar_paths(), steps)

    def measure_rate(part: str, ranks: int) -> dict[str, float]:
        def measure() -> dict[str, float]:
            result = bench.train(run, ranks)
            busy = {f"busy_{s}": share for s, share in enumerate(result.summary["utilisation"])}
            return {"samples_per_s": result.samples_per_s(), **busy}

        return bench.cached(part, measure)

    ours, single = alternate(
        5, lambda n: measure_rate(f"two-{n}", RANKS), lambda n: measure_rate(f"one-{n}", 1)
    )
    ratios = [a["samples_per_s"] / b["samples_per_s"] for a, b in zip(ours, single, strict=True)]
    costs = [block["multiply_adds"] for block in bench.plan(run, RANKS)["blocks"]]
    figures = medians(ours) | {"bound": sum(costs) / max(costs)}
    publish(
        "local_head_scaling", "measured", figures, medians(single), median(ratios), spread(ratios),
        quick=quick,
    )  # fmt: skip


def resnet(train: str, test: str, steps: int) -> Table:
    """Return the run file: two segments of `steps` updates, of which the first warms up."""
    return {
        "updates": steps * 2,
        "segment": steps,
        "batch-size": BATCH,
        "data": {"name": "user:subset", "train": train, "test": test, "rows": 10000, "tests": 128},
        "model": {"name": "resnet", "depth": 20},
        "partition": {"blocks": RANKS, "balance": "flops"},
        "objective": {"name": "local-head", "head": "dgl"},
        "schedule": {"name": "stream"},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    }


if __name__ == "__main__":
    main()
