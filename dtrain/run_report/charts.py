"""Charts of runs, drawn with matplotlib; needs the extra `report`.

Invariant: equal values give equal files, and the style of the caller's own figures stays as it is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import ConfigError
from dtrain.run_report.plan_file import DrawnAction
from dtrain.run_report.traffic import Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""The colours of Okabe and Ito, which colour-blind readers can tell apart."""


DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


ACTION_COLOURS = {"F": "#a9cfe5", "again": "#cfe5a9", "B": "#2a6f97", "W": "#7fb069"}
"""Those of `dtrain plan --plot`."""


UPDATE_COLOUR, WAIT_COLOUR, IDLE_COLOUR, BUSY_COLOUR = "#c1121f", "#ffffff", "#ececec", "#2a6f97"


ACTION_LABELS = {
    "F": "forward",
    "again": "further forward",
    "B": "backward",
    "W": "weight gradients",
    "U": "update",
}


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


WIDTH, HEIGHT = 5.6, 3.2
"""Size of a chart in inches."""


WIDE = 10.4
"""Width of a timeline in inches."""


MAX_LEGEND, MAX_NAME = 10, 28
"""Entries of a legend, and characters of a name."""


STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,  # a name may hold a dollar sign
    "text.usetex": False,
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "dtrain",
}


@contextmanager
def chart_style() -> Iterator[None]:
    """Draw with the style of reports, whatever the caller's own is."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        parameters: Any = mpl.rcParams
        parameters.update(STYLE)
        yield


def require_matplotlib() -> None:
    """Refuse to draw where matplotlib is missing.

    Raises
    ------
    ConfigError
        matplotlib cannot be imported.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_extra("matplotlib") from error


def missing_extra(package: str) -> ConfigError:
    """Return the error for a package of the extra `report` that is not installed."""
    return ConfigError(
        "report.extra-missing",
        f"this needs {package}, which is not installed: type `pip install 'dtrain[report]'`",
    )


def svg_text(figure: Figure) -> str:
    """Return a figure as the text of an SVG file."""
    with chart_style():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode("utf-8")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a file; its suffix says which kind.

    Raises
    ------
    ConfigError
        The file cannot be written, or matplotlib does not write files of that kind.
    """
    try:
        with chart_style():
            figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "plot.unwritable", f"cannot write {path}: {error}; choose another file"
        ) from error


def short_name(name: str, length: int = MAX_NAME) -> str:
    """Return a name that fits into a legend."""
    name = " ".join(name.split()) or "-"
    return name if len(name) <= length else f"{name[: length - 1]}…"


def plot_history(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the losses, and below them the first test metric, of one run.

    Parameters
    ----------
    history : sequence of mapping
        One entry per epoch: `epoch`, `train_loss`, `test_loss` and `metrics`, where known.
    path : str or Path
        The file, such as "loss.png", "loss.svg" or "loss.pdf".

    Raises
    ------
    ConfigError
        matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    names = list(dict.fromkeys(name for entry in history for name in entry.get("metrics") or {}))
    with chart_style():
        figure, axes = _figure(WIDTH, HEIGHT * (2 if names else 1), rows=2 if names else 1)
        curves = {
            "training": series(history, "train_loss"),
            "test": series(history, "test_loss"),
        }
        _draw_curves(axes[0], curves, "loss")
        for name in names[:1]:
            _draw_curves(axes[1], {"test": metric_series(history, name)}, metric_label(name))
            _use_percent(axes[1], name, [metric_series(history, name)])
        axes[-1].set_xlabel("epoch")
    save_figure(figure, Path(path))


def series(history: Sequence[Mapping[str, Any]], key: str, index: int | None = None) -> Points:
    """Return the points (epoch, value) of a value, or of one item of a list."""
    points = []
    for number, entry in enumerate(history, 1):
        value = entry.get(key)
        if index is not None:
            value = value[index] if value is not None and index < len(value) else None
        if value is not None:
            epoch = entry.get("epoch")
            points.append((float(number if epoch is None else epoch), float(value)))
    return points


def metric_series(history: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Return the points (epoch, value) of a metric."""
    entries = [{**entry, "value": (entry.get("metrics") or {}).get(name)} for entry in history]
    return series(entries, "value")


def metric_label(name: str) -> str:
    """Return the label of an axis: an accuracy has a unit."""
    return f"{name} (%)" if "accuracy" in name else name


def curve_chart(
    curves: Mapping[str, Points],
    label: str,
    *,
    percent: bool = False,
    colours: Sequence[str] = (),
    dashes: Sequence[Any] = (),
    title: str = "",
    from_zero: bool = False,
) -> Figure | None:
    """Return a chart of curves over epochs, None without a point.

    Parameters
    ----------
    curves : mapping of str to points
        By the names of the legend.
    label : str
        Label of the vertical axis, with its unit.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    with chart_style():
        figure, (axis,) = _figure(WIDTH, HEIGHT)
        _draw_curves(axis, curves, label, colours, dashes)
        if percent:
            _use_percent(axis, "accuracy", list(curves.values()))
        if from_zero:
            axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch")
        if title:
            axis.set_title(short_name(title))
    return figure


def _figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)
    return figure, list(axes[:, 0])


def _draw_curves(
    axis: Axes,
    curves: Mapping[str, Points],
    label: str,
    colours: Sequence[str] = (),
    dashes: Sequence[Any] = (),
) -> None:
    from matplotlib.ticker import MaxNLocator

    handles = []
    for number, points in enumerate(curves.values()):
        x, y = zip(*points, strict=True) if points else ((), ())
        marker = "o" if len(points) <= 30 else ""
        colour = colours[number] if colours else COLOURS[number % len(COLOURS)]
        dash = dashes[number] if dashes else DASHES[number // len(COLOURS) % len(DASHES)]
        handles += axis.plot(x, y, marker=marker, color=colour, linestyle=dash)
    values = [y for points in curves.values() for _, y in points]
    if label.startswith("loss") and values and min(values) > 0 and max(values) > 50 * min(values):
        axis.set_yscale("log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(_log_tick)
        label += ", logarithmic"
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if len(curves) > 1:
        names = [short_name(name) for name in curves]
        shown = slice(None) if len(names) <= MAX_LEGEND else slice(0, MAX_LEGEND)
        axis.legend(handles[shown], [f" {name}" for name in names[shown]])


def _log_tick(value: float, _: object = None) -> str:
    """Return the label of a tick on a logarithmic axis; the others than 1, 2 and 5 have none."""
    digit = f"{value:e}"[0] if value > 0 else ""
    return f"{value:g}" if digit in "125" else ""


def _use_percent(axis: Axes, name: str, curves: Sequence[Points]) -> None:
    """Show fractions in percent, if the metric is one."""
    values = [y for points in curves for _, y in points]
    if "accuracy" not in name or not values or not all(0 <= value <= 1 for value in values):
        return
    from matplotlib.ticker import FuncFormatter

    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.005)
    axis.set_ylim(max(low - margin, 0.0 - 0.01), min(high + margin, 1.005))


def block_colours(blocks: int) -> list[str]:
    """Return a colour per block: distinct ones, or a ramp from the first to the last."""
    if blocks <= len(COLOURS):
        return list(COLOURS[:blocks])
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    ramp = mpl.colormaps["viridis"]
    return [to_hex(ramp(0.9 * block / (blocks - 1))) for block in range(blocks)]


def timeline_chart(
    panels: Sequence[tuple[str, Sequence[DrawnAction]]], unit: str, row_name: str = "stage"
) -> Figure:
    """Return timelines below each other, on one scale.

    Parameters
    ----------
    panels : sequence of (str, sequence of DrawnAction)
        Title and actions of each.
    unit : str
        Unit of the times.
    """
    rows = [max((action.row for action in actions), default=0) + 1 for _, actions in panels]
    end = max((action.end for _, actions in panels for action in actions), default=1.0) or 1.0
    with chart_style():
        from matplotlib.figure import Figure

        height = sum(rows) * 0.3 + 0.45 * len(panels) + 0.9
        figure = Figure(figsize=(WIDE, height), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=rows)
        for axis, (title, actions), count in zip(axes[:, 0], panels, rows, strict=True):
            _draw_timeline(axis, actions, count, end, row_name)
            axis.set_title(title)
        axes[-1, 0].set_xlabel(f"time ({unit})")
        kinds = {action.kind for _, actions in panels for action in actions}
        figure.legend(handles=_action_handles(kinds), loc="outside lower center", ncols=7)
    return figure


def _draw_timeline(
    axis: Axes, actions: Sequence[DrawnAction], rows: int, end: float, row_name: str
) -> None:
    """Draw a row per stage; the grey ground is idle time."""
    axis.barh(range(rows), [end] * rows, height=0.78, color=IDLE_COLOUR)
    for kind, colour in ACTION_COLOURS.items():
        _draw_bars(axis, [a for a in actions if a.kind == kind], color=colour, edgecolor="white")
    updates = [a for a in actions if a.kind == "U"]
    shortest = 0.003 * end
    starts = [min(a.start, end - shortest) for a in updates]
    marks = [
        a._replace(start=start, end=max(a.end, start + shortest))
        for a, start in zip(updates, starts, strict=True)
    ]
    _draw_bars(axis, marks, color=UPDATE_COLOUR)
    waits = [a for a in actions if a.kind == "wait"]
    _draw_bars(axis, waits, color=WAIT_COLOUR, edgecolor="#999999", hatch="/////")
    for action in actions:
        if action.kind in ACTION_COLOURS and action.end - action.start > 0.013 * end:
            dark = action.kind in ("B", "W")
            axis.text(
                (action.start + action.end) / 2,
                action.row,
                action.label,
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else "#222222",
            )
    axis.set_yticks(range(rows), [f"{row_name} {row}" for row in range(rows)])
    axis.invert_yaxis()
    axis.set_xlim(0, end)
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _draw_bars(axis: Axes, actions: Sequence[DrawnAction], **style: Any) -> None:
    if actions:
        axis.barh(
            [action.row for action in actions],
            [action.end - action.start for action in actions],
            left=[action.start for action in actions],
            height=0.78,
            linewidth=0.5,
            **style,
        )


def _action_handles(kinds: set[str]) -> list[Any]:
    from matplotlib.patches import Patch

    colours = ACTION_COLOURS | {"U": UPDATE_COLOUR}
    handles = [
        Patch(color=colour, label=ACTION_LABELS[kind])
        for kind, colour in colours.items()
        if kind in kinds
    ]
    if "wait" in kinds:
        handles.append(
            Patch(facecolor=WAIT_COLOUR, edgecolor="#999999", hatch="/////", label="waiting")
        )
    return [*handles, Patch(color=IDLE_COLOUR, label="idle")]


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
        figure, (axis,) = _figure(WIDTH, height)
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
        "waiting": ("#e0e0e0", [100 - share for share in busy]),
    }
    return bar_chart(names, parts, "share of the training time (%)", limit=100)


def byte_unit(largest: float) -> tuple[str, float]:
    """Return a unit in which a number of bytes is easy to read, and its size."""
    for name, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if largest >= size:
            return name, size
    return "bytes", 1.0


def traffic_chart(runs: Sequence[tuple[str, Sequence[Traffic]]]) -> Figure:
    """Return the bytes of runs by kind, with one bar inside and one between nodes for each run."""
    kinds = list(dict.fromkeys(traffic.kind for _, kinds in runs for traffic in kinds))
    names: list[str] = []
    lengths: dict[str, list[float]] = {kind: [] for kind in kinds}
    for name, traffics in runs:
        prefix = f"{short_name(name, 14)}, " if len(runs) > 1 else ""
        names += [f"{prefix}inside nodes", f"{prefix}between nodes"]
        sizes = {traffic.kind: (traffic.intra_node, traffic.inter_node) for traffic in traffics}
        for kind in kinds:
            lengths[kind] += sizes.get(kind, (0, 0))
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
