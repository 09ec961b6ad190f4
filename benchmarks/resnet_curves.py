"""Accuracy per epoch of ResNet-20 with DGL heads in two blocks, over backpropagation.

`ratio` = final accuracy with local heads over that with backprop. One repetition, hence no `spread`
(null).

Set-up: 10,000 training and 2,000 test images of CIFAR-10, 3 epochs, 128 samples per update, SGD
with momentum, one seed. Ours: `local-head` with DGL heads on 2 ranks; peer: `backprop` as one block
on one rank with two threads. `curves` holds the test accuracy (0-1) after each epoch of both.

    python benchmarks/resnet_curves.py [--quick]

Label: measured. Time: under five minutes. `--quick`: 1,000 and 500 images, 2 epochs. Reads
`cifar10-jpeg.tar.gz` from ``DTRAIN_DATA`` (default ``../shared/data``).
"""

from __future__ import annotations

from typing import Any

from bench import Bench, cifar_paths, parse_quick
from record import publish

from dtrain.schema import Table

METHODS: dict[str, tuple[Table, int, int, int]] = {
    # objective, blocks, ranks, threads
    "local-head": ({"name": "local-head", "head": "dgl"}, 2, 2, 1),
    "backprop": ({"name": "backprop"}, 1, 1, 2),
}


def main() -> None:
    """Train both and publish the record."""
    quick = parse_quick(__doc__)
    bench, paths = Bench("resnet_curves", quick), cifar_paths()
    sizes = (1000, 500, 2) if quick else (10000, 2000, 3)

    def measure_curve(name: str) -> dict[str, Any]:
        objective, blocks, ranks, threads = METHODS[name]
        result = bench.train(run(paths, sizes, objective, blocks), ranks, threads)
        accuracies = [record["test_accuracy"] for record in result.eval_records]
        return {"curve": accuracies, "wall_s": result.summary["wall_s"]}

    results = {name: bench.cached(name, lambda name=name: measure_curve(name)) for name in METHODS}  # type: ignore[misc]
    figures = {
        name: {"test_accuracy": row["curve"][-1], "wall_s": row["wall_s"]}
        for name, row in results.items()
    }
    ours, peer = figures["local-head"], figures["backprop"]
    ratio = ours["test_accuracy"] / peer["test_accuracy"]
    curves = {name: row["curve"] for name, row in results.items()}
    publish("resnet_curves", "measured", ours, peer, ratio, None, quick=quick, curves=curves)


def run(
    paths: tuple[str, str], sizes: tuple[int, int, int], objective: Table, blocks: int
) -> Table:
    """Return the run file; `sizes` are training images, test images and epochs."""
    rows, tests, epochs = sizes
    files = {"train": paths[0], "test": paths[1], "rows": rows, "tests": tests}
    return {
        "epochs": epochs,
        "batch-size": 128,
        "data": {"name": "user:subset", **files},
        "model": {"name": "resnet", "depth": 20},
        "partition": {"blocks": blocks},
        "objective": objective,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    }


if __name__ == "__main__":
    main()
