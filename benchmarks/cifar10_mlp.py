"""Accuracy of Mono-Forward on CIFAR-10 with an MLP in three blocks, over backpropagation.

`ratio` = accuracy of Mono-Forward over that of backpropagation with the same seed, the median over
seeds; `spread` = its range.

Set-up: `jobs/cifar10.toml`, an MLP 3072-1000-1000-1000 on three ranks, 10 epochs, seeds 0 to 4;
Mono-Forward and, from the same run file, backpropagation (1F1B) as the peer, alternately. `figures`
and `peer` hold the medians over the seeds of the test accuracy after the last epoch (0-1), of the
last block and of the vote. No figure is a time: three ranks share two cores.

    python benchmarks/cifar10_mlp.py [--quick]

Label: measured. Reads `cifar10-jpeg.tar.gz` from ``DTRAIN_DATA`` (default ``../shared/data``); JPEG
costs a little accuracy against the original files. Finished cells stay in ``runs/cifar10_mlp`` and
are not trained again; delete the folder to start anew. `--quick`: one epoch, one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from record import ROOT, publish

RANKS = 3
KEYS = ("test_accuracy", "test_accuracy_vote")


def main() -> None:
    """Train all cells and publish the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    source = Path(os.environ.get("DTRAIN_DATA", ROOT.parent / "shared" / "data"))
    folder = ROOT / "runs" / ("cifar10_mlp-quick" if quick else "cifar10_mlp")
    if not (folder / "cifar10.h5").exists():
        folder.mkdir(parents=True, exist_ok=True)
        run_dtrain(
            "data", "import", str(source / "cifar10-jpeg.tar.gz"), str(folder / "cifar10.h5")
        )
    seeds, epochs = (range(1), 1) if quick else (range(5), 10)
    cells = {
        (objective, seed): train(folder, objective, seed, epochs)
        for seed in seeds
        for objective in ("mono-forward", "backprop")
    }
    ours, peer = (median_figures(cells, objective) for objective in ("mono-forward", "backprop"))
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


def run_dtrain(*arguments: str) -> None:
    """Run one command of dtrain, its output to stderr."""
    argv = [sys.executable, "-m", "dtrain", *arguments]
    subprocess.run(argv, cwd=ROOT, stdout=sys.stderr, check=True)


def train(folder: Path, objective: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train one cell on three ranks of this host, one thread each; return its summary.

    An interrupted cell resumes from its last epoch; a finished cell is not trained again.
    """
    out = folder / f"{objective}-{seed}"
    settings = [f"objective.name={objective}", f"seed={seed}", f"epochs={epochs}", "threads=1"]
    settings += [f"data.train={folder / 'cifar10.h5'}", f"data.test={folder / 'cifar10-test.h5'}"]
    options = [word for setting in settings for word in ("--set", setting)]
    run = str(ROOT / "jobs" / "cifar10.toml")
    run_dtrain("train", run, "--ranks", str(RANKS), "--out", str(out), *options)
    return dict(json.loads((out / "summary.json").read_text(encoding="utf-8")))


def median_figures(
    cells: dict[tuple[str, int], dict[str, Any]], objective: str
) -> dict[str, float]:
    """Return the medians over seeds of one objective."""
    summaries = [cell for (name, _), cell in cells.items() if name == objective]
    return {key: median(cell[key] for cell in summaries) for key in KEYS}


if __name__ == "__main__":
    main()
