"""Draw benchmark records as SVG for the docs; needs the extra `plots`.

Invariant: figures show the values and errors of the record, unchanged.
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


def draw_objectives(record: Path, out: Path) -> None:
    """Draw the accuracies of `objectives_cifar10`: the MLP and ResNet-32.

    Baselines are grey. A bar ends at the mean over seeds; its line spans two standard errors.
    """
    cells = json.loads(record.read_text(encoding="utf-8"))["cells"]
    mpl.rcParams["svg.hashsalt"] = "dtrain"  # the same record gives the same file
    panels = [
        {k.removeprefix(f"{net} "): v for k, v in cells.items() if k.startswith(f"{net} ")}
        for net in TITLES
    ]
    heights = [len(rows) for rows in panels]
    figure = Figure(figsize=(8, 0.24 * sum(heights) + 2.2), layout="constrained")
    axes = figure.subplots(len(panels), 1, gridspec_kw={"height_ratios": heights})
    for axis, rows, title in zip(axes, panels, TITLES.values(), strict=True):
        _draw_accuracy_bars(axis, rows, title)
    figure.savefig(out, metadata={"Date": None})


TITLES = {
    "mlp": "MLP 3 x 1000, three blocks, 5 epochs",
    "resnet k2": "ResNet-32, 2 blocks, 4 epochs of 5,000 images",
    "resnet k8": "ResNet-32, 8 blocks",
}


def _draw_accuracy_bars(axis: Axes, rows: Mapping[str, Any], title: str) -> None:
    """Draw one bar per row, the best at the top."""
    names = sorted(rows, key=lambda name: float(rows[name]["test_accuracy"]))
    means = [100 * rows[name]["test_accuracy"] for name in names]
    errors = [200 * (rows[name]["standard_error"] or 0) for name in names]
    colours = [BASE if name in BASELINES else OURS for name in names]
    axis.barh(names, means, xerr=errors, color=colours, height=0.7, error_kw={"lw": 1})
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("test accuracy, % (lines: two standard errors)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def draw_links(record: Path, out: Path) -> None:
    """Draw the times to accuracy of `slow_link_accuracy`, one row of two panels per link rate.

    The left panel has bars; the right panel has times over the bytes between nodes. torch DDP is
    grey. A strategy that misses the target is hollow and labelled with its final accuracy; its time
    and bytes are those of all epochs.
    """
    data = json.loads(record.read_text(encoding="utf-8"))
    mpl.rcParams["svg.hashsalt"] = "dtrain"
    rows = data["strategies"]
    rates = list(rows["every-step"]["links"])
    figure = Figure(figsize=(11, (0.24 * len(rows) + 0.9) * len(rates)), layout="constrained")
    axes = figure.subplots(len(rates), 2, squeeze=False, width_ratios=[3, 2])
    for (left, right), rate in zip(axes, rates, strict=True):
        peer = data["peer"][f"{rate} every-step to_accuracy_s"]
        _draw_time_bars(left, rows, rate, peer)
        _draw_scatter(right, rows, rate, peer)
    label = f"minutes to a test accuracy of {100 * data['target']:.2f} % (hollow: of all epochs)"
    axes[-1, 0].set_xlabel(label, fontsize=8)
    axes[-1, 1].set_xlabel("gigabytes between nodes until then", fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def _bytes_to_target(row: Mapping[str, Any]) -> float:
    """Return the bytes between nodes up to the target; of all epochs if it is missed."""
    epochs = len(row["curve"])
    updates = row["updates"] / epochs * (row["epochs"] or epochs)
    return float(row["bytes_inter_node_per_update"] * updates)


NEAR = 1.6
"""Names of points overlap within this factor in minutes and gigabytes."""
WIDE, LEVEL = 5, 0.15
"""Width of a name as a factor in gigabytes, and height of a line as a logarithm of minutes."""
RATES = {"1gbit": "of 1 Gbit/s", "100mbit": "of 100 Mbit/s", "unshaped": "without a bound"}


def _draw_time_bars(axis: Axes, rows: Mapping[str, Any], rate: str, peer: float) -> None:
    """Draw one bar per strategy and one for the peer, the fastest at the top."""
    bars = [(peer, "torch DDP", f"{peer / 60:.1f} min", BASE, BASE)]
    missed: list[tuple[float, str, str, str, str]] = []
    for name, row in rows.items():
        times = row["links"][rate]
        if seconds := times["to_accuracy_s"]:
            label = f"{seconds / 60:.1f} min, {100 * seconds / peer:.0f} %"
            bars.append((seconds, name, label, OURS, OURS))
        else:
            run_s, accuracy = times["run_s"], row["curve"][-1]
            label = f"never: {100 * accuracy:.2f} % after {run_s / 60:.1f} min"
            missed.append((run_s, name, label, "none", OURS))
    bars = sorted(missed, reverse=True) + sorted(bars, reverse=True)
    minutes = [bar[0] / 60 for bar in bars]
    _, names, labels, faces, edges = zip(*bars, strict=True)
    container = axis.barh(names, minutes, color=faces, edgecolor=edges, height=0.7)
    axis.bar_label(container, labels, padding=3, fontsize=8)
    axis.set_xmargin(0.4)
    axis.set_title(f"links {RATES[rate]}", fontsize=10, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_scatter(axis: Axes, rows: Mapping[str, Any], rate: str, peer: float) -> None:
    """Draw named points: minutes over gigabytes, both axes logarithmic."""
    points = {"torch DDP": (_bytes_to_target(rows["every-step"]) / 1e9, peer / 60)}
    for name, row in rows.items():
        times = row["links"][rate]
        seconds = times["to_accuracy_s"] or times["run_s"]
        points[name] = _bytes_to_target(row) / 1e9, seconds / 60
    for name, (x, y) in points.items():
        colour = BASE if name == "torch DDP" else OURS
        reached = name == "torch DDP" or rows[name]["epochs"]
        face = colour if reached else "none"
        axis.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=4)
        covered = any(y < b < NEAR * y and x / NEAR < a < NEAR * x for a, b in points.values())
        level = [a for a, b in points.values() if abs(log(b / y)) < LEVEL]
        right_of, left_of = (
            any(x < a < WIDE * x for a in level),
            any(x / WIDE < a < x for a in level),
        )
        side = "center" if right_of and left_of else "right" if right_of else "left"
        # A name is above its point; it is below if another point or two neighbours are in the way.
        shift = (
            {"left": 4, "center": 0, "right": -4}[side],
            -10 if covered or (right_of and left_of) else 4,
        )
        axis.annotate(name, (x, y), shift, textcoords="offset points", fontsize=6, ha=side)
    axis.set(xscale="log", yscale="log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())
    axis.set_ylabel("minutes", fontsize=8)
    axis.margins(x=0.25, y=0.15)
    axis.tick_params(labelsize=7, which="both")
    axis.spines[["top", "right"]].set_visible(False)


def draw_equal_time(record: Path, out: Path) -> None:
    """Draw the validation losses of `lm_equal_time` over minutes, and those of `lm_blocks`.

    A line is the mean over the seeds, its band their range; `1f1b` is grey.
    """
    runs = json.loads(record.read_text(encoding="utf-8"))["runs"]
    blocks = json.loads(record.with_name("lm_blocks.json").read_text(encoding="utf-8"))
    mpl.rcParams["svg.hashsalt"] = "dtrain"
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for number, label in enumerate(dict.fromkeys(run["label"] for run in runs)):
        colour = BASE if label == "1f1b" else f"C{number}"
        curves = [run["curve"] for run in runs if run["label"] == label]
        _draw_loss_curve(left, label, curves, colour)
        cells = [(key, loss) for key, loss in blocks["figures"].items() if key.startswith(label)]
        numbers = [key.rpartition(" ")[2] for key, _ in cells]
        losses = [loss for _, loss in cells]
        right.plot(numbers, losses, "o-", color=colour, markersize=4, lw=1)
    left.set_xlabel("minutes of training, two ranks", fontsize=8)
    left.set_ylabel("validation loss", fontsize=8)
    right.set_xlabel(f"blocks ({blocks['updates']:,} updates each)", fontsize=8)
    left.legend(fontsize=7)
    for axis in (left, right):
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


def _draw_loss_curve(axis: Axes, label: str, seeds: Any, colour: str) -> None:
    """Draw the mean and the range of the curves [seconds, loss] of all seeds of a label."""
    points = [list(zip(*curves, strict=True)) for curves in zip(*seeds, strict=True)]
    minutes = [sum(seconds) / len(seconds) / 60 for seconds, _ in points]
    losses = [loss for _, loss in points]
    axis.plot(minutes, [sum(loss) / len(loss) for loss in losses], color=colour, label=label, lw=1)
    low, high = ([end(loss) for loss in losses] for end in (min, max))
    axis.fill_between(minutes, low, high, color=colour, alpha=0.2, lw=0)


DRAWINGS = {
    "objectives_cifar10": draw_objectives,
    "slow_link_accuracy": draw_links,
    "lm_equal_time": draw_equal_time,
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        path = ROOT / "benchmarks" / "records" / f"{name}.json"
        if path.exists():
            draw(path, ROOT / "docs" / f"{name}.svg")
