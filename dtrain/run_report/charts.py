"""The style of charts, and curves over epochs, drawn with matplotlib; needs the extra `report`.

Invariant: equal values give equal files, and the style of the caller's own figures stays as it is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""The colours of Okabe and Ito, which colour-blind readers can tell apart."""


DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


WIDTH, HEIGHT = 5.6, 3.2
"""Size of a chart in inches."""


MAX_LEGEND, SHORT_LEGEND, MAX_NAME = 10, 5, 28
"""Entries of a legend, those of one with more curves than that, and characters of a name."""


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
        figure, axes = make_figure(WIDTH, HEIGHT * (2 if names else 1), rows=2 if names else 1)
        _draw_curves(axes[0], loss_curves(history), "loss")
        for name in names[:1]:
            _draw_curves(axes[1], {"test": metric_series(history, name)}, metric_label(name))
            _use_percent(axes[1], name, [metric_series(history, name)])
        axes[-1].set_xlabel("epoch")
    save_figure(figure, Path(path))


def loss_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Return the losses over epochs: "training", "test" and those of other splits."""
    others = (key for entry in history for key in entry if key.endswith("_loss"))
    keys = dict.fromkeys(["train_loss", "test_loss", *others])
    names = {"train_loss": "training"} | {key: key.removesuffix("_loss") for key in [*keys][1:]}
    curves = {names[key]: series(history, key) for key in keys}
    return {name: points for name, points in curves.items() if points}


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
        figure, (axis,) = make_figure(WIDTH, HEIGHT)
        _draw_curves(axis, curves, label, colours, dashes)
        if percent:
            _use_percent(axis, "accuracy", list(curves.values()))
        if from_zero:
            axis.set_ylim(0, 1.08 * max(y for points in curves.values() for _, y in points) or 1)
        axis.set_xlabel("epoch")
        if title:
            axis.set_title(short_name(title))
    return figure


def make_figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure, in inches, and its axes from the top."""
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
        dash: Any = "-" if colours else DASHES[number // len(COLOURS) % len(DASHES)]
        handles += axis.plot(
            x,
            y,
            marker=marker,
            color=colour,
            linestyle=dashes[number] if dashes else dash,
            linewidth=1.8 if len(curves) <= MAX_LEGEND else 0.9,
        )
    values = [y for points in curves.values() for _, y in points]
    if label.startswith("loss") and values and min(values) > 0 and max(values) > 50 * min(values):
        axis.set_yscale("log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(_log_tick)
        label += ", logarithmic"
    axis.set_ylabel(label)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if len(curves) > 1:
        names = [f" {short_name(name)}" for name in curves]
        count = len(names) if len(names) <= MAX_LEGEND else SHORT_LEGEND
        shown = [round(n * (len(names) - 1) / (count - 1)) for n in range(count)]
        axis.legend([handles[n] for n in shown], [names[n] for n in shown])


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
