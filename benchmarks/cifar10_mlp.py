"""CIFAR-10 with an MLP 3072-1000-1000-1000 in three blocks on three ranks: accuracy.

`jobs/cifar10.toml` as it stands, 10 epochs, seeds 0, 1 and 2, Mono-Forward and, from the same run
file, backpropagation (1F1B) as the peer. `figures` and `peer` hold medians over the seeds of test
accuracy (0-1), of the final epoch, and of samples per second (three ranks on two cores say nothing
about scaling). `ratio` = accuracy of Mono-Forward over that of backpropagation, median of the
seeds; `spread` = its largest less its smallest value.

    python benchmarks/cifar10_mlp.py [--quick]

The images are looked for in ``DTRAIN_DATA`` (default ``../shared/data``): `cifar10-jpeg.tar.gz`.
JPEG costs a little accuracy against the original files. `--quick`: one epoch, one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from record import ROOT, publish

RANKS = 3
KEYS = ("test_accuracy", "test_accuracy_vote", "samples_per_s", "wall_s")


def main() -> None:
    """Train all cells and publish the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    source = Path(os.environ.get("DTRAIN_DATA", ROOT.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtrain("data", "import", str(source / "cifar10-jpeg.tar.gz"), str(folder / "cifar10.h5"))
        seeds, epochs = ((0,), 1) if quick else ((0, 1, 2), 10)
        cells = {
            (objective, seed): train(folder, objective, seed, epochs)
            for seed in seeds
            for objective in ("mono-forward", "backprop")
        }
    ours, peer = (figures(cells, objective) for objective in ("mono-forward", "backprop"))
    ratios = [
        cells["mono-forward", seed]["test_accuracy"] / cells["backprop", seed]["test_accuracy"]
        for seed in seeds
    ]
    publish(
        "cifar10_mlp",
        "measured",
        ours,
        peer,
        median(ratios),
        max(ratios) - min(ratios),
        quick=quick,
        seeds=list(seeds),
        epochs=epochs,
        accuracy={f"{o} seed {s}": cell["test_accuracy"] for (o, s), cell in cells.items()},
    )


def dtrain(*words: str) -> None:
    """Run one command of dtrain, its output to stderr."""
    argv = [sys.executable, "-m", "dtrain", *words]
    subprocess.run(argv, cwd=ROOT, stdout=sys.stderr, check=True)


def train(folder: Path, objective: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train one cell on three ranks of this host, one thread each; return its summary."""
    out = folder / f"{objective}-{seed}"
    sets = [f"objective.name={objective}", f"seed={seed}", f"epochs={epochs}", "threads=1"]
    sets += [f"data.train={folder / 'cifar10.h5'}", f"data.test={folder / 'cifar10-test.h5'}"]
    words = [word for each in sets for word in ("--set", each)]
    run = str(ROOT / "jobs" / "cifar10.toml")
    dtrain("train", run, "--ranks", str(RANKS), "--out", str(out), *words)
    told: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return told


def figures(cells: dict[tuple[str, int], dict[str, Any]], objective: str) -> dict[str, float]:
    """Return the medians over seeds of one objective."""
    own = [cell for (name, _), cell in cells.items() if name == objective]
    return {key: median(cell[key] for cell in own) for key in KEYS}


if __name__ == "__main__":
    main()
