"""Bars of stages, ranks and runs: time, memory and bytes, drawn with matplotlib.

Invariant: equal values give equal files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtrain.run_report.charts import WIDTH, chart_style, make_figure, short_name
from dtrain.run_report.traffic import Traffic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUSY_COLOUR, WAITING_COLOUR = "#2a6f97", "#e0e0e0"


MEMORY_COLOURS = {
    "parameters": "#0072b2",
    "gradients": "#56b4e9",
    "optimizer": "#009e73",
    "sync": "#cc79a7",
    "versions": "#999999",
    "live activations": "#e69f00",
    "messages": "#f0e442",
}


TRAFFIC_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#999999")


def bar_chart(
    names: Sequence[str],
    parts: Mapping[str, tuple[str, Sequence[float]]],
    label: str,
    *,
    marks: Sequence[float | None] = (),
    mark_label: str = "",
    limit: float | None = None,
    title: str = "",
) -> Figure:
    """Return horizontal stacked bars.

    Parameters
    ----------
    names : sequence of str
        Names of the bars, from the top.
    parts : mapping of str to (str, sequence of float)
        Colour and lengths of each part, by its name.
    label : str
        Label of the axis, with its unit.
    marks : sequence of float or None
        A mark on each bar.
    limit : float, optional
        End of the axis.
    """
    with chart_style():
        height = 0.34 * len(names) + 1.35 + (0.25 if len(parts) > 3 else 0)
        figure, (axis,) = make_figure(WIDTH, height)
        left = [0.0] * len(names)
        handles: list[Any] = []
        for colour, lengths in parts.values():
            handles.append(
                axis.barh(range(len(names)), lengths, left=left, color=colour, height=0.66)
            )
            left = [a + b for a, b in zip(left, lengths, strict=True)]
        legend_names = list(parts)
        points = [(mark, row) for row, mark in enumerate(marks) if mark is not None]
        if points:
            handles += axis.plot(*zip(*points, strict=True), "D", color="black", markersize=5)
            legend_names.append(mark_label)
        axis.set_yticks(range(len(names)), [short_name(name) for name in names])
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(label)
        axis.set_xlim(0, limit)
        if title:
            axis.set_title(short_name(title))
        columns = 3 if len(legend_names) > 3 else len(legend_names)
        figure.legend(
            handles,
            [f" {name}" for name in legend_names],
            loc="outside lower center",
            ncols=columns,
        )
    return figure


def utilisation_chart(names: Sequence[str], shares: Sequence[float]) -> Figure:
    """Return the shares of computing and of waiting, in percent."""
    busy = [100 * share for share in shares]
    parts = {
        "computing": (BUSY_COLOUR, busy),
        "waiting": (WAITING_COLOUR, [100 - share for share in busy]),
    }
    return bar_chart(names, parts, "share of the training time (%)", limit=100)


def byte_unit(largest: float) -> tuple[str, float]:
    """Return a unit in which a number of bytes is easy to read, and its size."""
    for name, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if largest >= size:
            return name, size
    return "bytes", 1.0


def traffic_chart(runs: Sequence[tuple[str, Sequence[Traffic]]]) -> Figure:
    """Return the bytes of runs by kind, with one bar inside and one between nodes for each run.

    The bars between nodes are left out where all are 0.
    """
    ends = 2 if any(traffic.inter_node for _, kinds in runs for traffic in kinds) else 1
    kinds = list(dict.fromkeys(traffic.kind for _, kinds in runs for traffic in kinds))
    names: list[str] = []
    lengths: dict[str, list[float]] = {kind: [] for kind in kinds}
    for name, traffics in runs:
        prefix = f"{short_name(name, 14)}, " if len(runs) > 1 else ""
        names += [f"{prefix}inside nodes", f"{prefix}between nodes"][:ends]
        sizes = {traffic.kind: (traffic.intra_node, traffic.inter_node) for traffic in traffics}
        for kind in kinds:
            lengths[kind] += sizes.get(kind, (0, 0))[:ends]
    unit, size = byte_unit(max(map(sum, zip(*lengths.values(), strict=True)), default=0))
    parts = {
        kind: (TRAFFIC_COLOURS[number % len(TRAFFIC_COLOURS)], [v / size for v in values])
        for number, (kind, values) in enumerate(lengths.items())
    }
    return bar_chart(names, parts, f"sent in the whole run ({unit})")


def memory_chart(
    names: Sequence[str],
    planned: Sequence[Mapping[str, int]],
    counted: Sequence[float | None],
    title: str = "",
) -> Figure:
    """Return the planned memory of ranks by part, with a mark at the counted peak."""
    totals = [float(sum(parts.values())) for parts in planned]
    unit, size = byte_unit(max([*totals, *(value or 0.0 for value in counted)], default=0.0))
    parts = {
        part: (colour, [row.get(part, 0) / size for row in planned])
        for part, colour in MEMORY_COLOURS.items()
        if any(row.get(part) for row in planned)
    }
    marks = [None if value is None else value / size for value in counted]
    return bar_chart(
        names, parts, f"peak memory ({unit})", marks=marks, mark_label="counted", title=title
    )
