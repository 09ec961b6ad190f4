"""Draws a benchmark's record for the docs, as SVG; needs the extra `plots`.

Invariant: what is drawn is what the record holds, with its errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import ROOT

OURS, BASE = "#2a6f97", "#9a9a9a"
BASELINES = ("backprop", "deep-supervision", "frozen")


def objectives(record: Path, out: Path) -> None:
    """Draw the accuracies of `objectives_cifar10`: the perceptron, and the residual network.

    Baselines are grey; a bar ends at the mean over seeds, its line spans two standard errors.
    """
    cells = json.loads(record.read_text(encoding="utf-8"))["cells"]
    mpl.rcParams["svg.hashsalt"] = "dtrain"  # the same record gives the same file
    parts = [(f"{stem} ", title) for stem, title in TITLES.items()]
    chosen = [{k.removeprefix(s): v for k, v in cells.items() if k.startswith(s)} for s, _ in parts]
    heights = [len(rows) for rows in chosen]
    figure = Figure(figsize=(8, 0.24 * sum(heights) + 2.2), layout="constrained")
    axes = figure.subplots(len(parts), 1, gridspec_kw={"height_ratios": heights})
    for axis, rows, (_, title) in zip(axes, chosen, parts, strict=True):
        _bars(axis, rows, title)
    figure.savefig(out, metadata={"Date": None})


TITLES = {
    "mlp": "MLP 3 x 1000, three blocks, 5 epochs",
    "resnet k2": "ResNet-32, 2 blocks, 4 epochs of 5,000 images",
    "resnet k8": "ResNet-32, 8 blocks",
}


def _bars(axis: Axes, rows: Mapping[str, Any], title: str) -> None:
    """Draw one bar per row, the best on top."""
    names = sorted(rows, key=lambda name: float(rows[name]["test_accuracy"]))
    means = [100 * rows[name]["test_accuracy"] for name in names]
    errors = [200 * (rows[name]["standard_error"] or 0) for name in names]
    colours = [BASE if name in BASELINES else OURS for name in names]
    axis.barh(names, means, xerr=errors, color=colours, height=0.7, error_kw={"lw": 1})
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("test accuracy, % (lines: two standard errors)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    records = ROOT / "benchmarks" / "records"
    objectives(records / "objectives_cifar10.json", ROOT / "docs" / "objectives_cifar10.svg")
