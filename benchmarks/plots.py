"""Draws a benchmark's record for the docs, as SVG; needs the extra `plots`.

Invariant: what is drawn is what the record holds, with its errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
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


def links(record: Path, out: Path) -> None:
    """Draw the times of `slow_link_accuracy`, one panel for each rate of the links, and beside
    it over the bytes between nodes that were sent until then.

    torch DDP is grey; a strategy that never came there is hollow, with all its epochs, and says how
    far it came.
    """
    told = json.loads(record.read_text(encoding="utf-8"))
    mpl.rcParams["svg.hashsalt"] = "dtrain"
    rows = told["strategies"]
    rates = list(rows["every-step"]["links"])
    figure = Figure(figsize=(11, (0.24 * len(rows) + 0.9) * len(rates)), layout="constrained")
    axes = figure.subplots(len(rates), 2, squeeze=False, width_ratios=[3, 2])
    for (left, right), rate in zip(axes, rates, strict=True):
        peer = told["peer"][f"{rate} every-step to_accuracy_s"]
        _times(left, rows, rate, peer)
        _clouds(right, rows, rate, peer)
    words = f"minutes to a test accuracy of {100 * told['target']:.2f} % (hollow: of all epochs)"
    axes[-1, 0].set_xlabel(words, fontsize=8)
    axes[-1, 1].set_xlabel("gigabytes between nodes until then", fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def _sent(row: Mapping[str, Any]) -> float:
    """Return the bytes between nodes up to the accuracy, or of all epochs."""
    epochs = len(row["curve"])
    updates = row["updates"] / epochs * (row["epochs"] or epochs)
    return float(row["bytes_inter_node_per_update"] * updates)


NEAR = 1.6
"""The factor in minutes and gigabytes within which names of points would cover each other."""
WIDE, LEVEL = 5, 0.15
"""The factor in gigabytes that a name takes, and the logarithm of minutes that is one line."""
RATES = {"1gbit": "of 1 Gbit/s", "100mbit": "of 100 Mbit/s", "unshaped": "without a bound"}


def _times(axis: Axes, rows: Mapping[str, Any], rate: str, peer: float) -> None:
    """Draw one bar per strategy and the peer's, the fastest on top, with its share of that one."""
    bars = [(peer, "torch DDP", f"{peer / 60:.1f} min", BASE, BASE)]
    never: list[tuple[float, str, str, str, str]] = []
    for name, row in rows.items():
        own = row["links"][rate]
        if seconds := own["to_accuracy_s"]:
            words = f"{seconds / 60:.1f} min, {100 * seconds / peer:.0f} %"
            bars.append((seconds, name, words, OURS, OURS))
        else:
            run_s, last = own["run_s"], row["curve"][-1]
            words = f"never: {100 * last:.2f} % after {run_s / 60:.1f} min"
            never.append((run_s, name, words, "none", OURS))
    told = sorted(never, reverse=True) + sorted(bars, reverse=True)
    minutes = [bar[0] / 60 for bar in told]
    _, names, labels, faces, edges = zip(*told, strict=True)
    drawn = axis.barh(names, minutes, color=faces, edgecolor=edges, height=0.7)
    axis.bar_label(drawn, labels, padding=3, fontsize=8)
    axis.set_xmargin(0.4)
    axis.set_title(f"links {RATES[rate]}", fontsize=10, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _clouds(axis: Axes, rows: Mapping[str, Any], rate: str, peer: float) -> None:
    """Draw minutes over gigabytes, both logarithmic, each with its name."""
    there = {"torch DDP": (_sent(rows["every-step"]) / 1e9, peer / 60)}
    for name, row in rows.items():
        own = row["links"][rate]
        there[name] = _sent(row) / 1e9, (own["to_accuracy_s"] or own["run_s"]) / 60
    for name, (x, y) in there.items():
        colour = BASE if name == "torch DDP" else OURS
        came = name == "torch DDP" or rows[name]["epochs"]
        axis.plot(x, y, "o", color=colour, markerfacecolor=colour if came else "none", markersize=4)
        covered = any(y < b < NEAR * y and x / NEAR < a < NEAR * x for a, b in there.values())
        level = [a for a, b in there.values() if abs(log(b / y)) < LEVEL]
        more, less = any(x < a < WIDE * x for a in level), any(x / WIDE < a < x for a in level)
        side = "center" if more and less else "right" if more else "left"
        # The upper one of two has its name above it; one between two has it below.
        shift = (
            {"left": 4, "center": 0, "right": -4}[side],
            -10 if covered or (more and less) else 4,
        )
        axis.annotate(name, (x, y), shift, textcoords="offset points", fontsize=6, ha=side)
    axis.set(xscale="log", yscale="log")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(LogLocator(subs=(1, 2, 5)))
        each.set_major_formatter("{x:g}")
        each.set_minor_formatter(NullFormatter())
    axis.set_ylabel("minutes", fontsize=8)
    axis.margins(x=0.25, y=0.15)
    axis.tick_params(labelsize=7, which="both")
    axis.spines[["top", "right"]].set_visible(False)


DRAWN = {"objectives_cifar10": objectives, "slow_link_accuracy": links}

if __name__ == "__main__":
    for name, draw in DRAWN.items():
        path = ROOT / "benchmarks" / "records" / f"{name}.json"
        if path.exists():
            draw(path, ROOT / "docs" / f"{name}.svg")
