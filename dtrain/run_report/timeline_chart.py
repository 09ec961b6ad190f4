"""Timelines of stages, planned and measured, drawn with matplotlib.

Invariant: equal actions give equal files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtrain.run_report.charts import chart_style
from dtrain.run_report.plan_file import DrawnAction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 10.4
"""Width of a timeline in inches."""


ACTION_COLOURS = {"F": "#a9cfe5", "again": "#cfe5a9", "B": "#2a6f97", "W": "#7fb069"}
"""Those of `dtrain plan --plot`."""


UPDATE_COLOUR, WAIT_COLOUR, IDLE_COLOUR = "#c1121f", "#ffffff", "#ececec"


ACTION_LABELS = {
    "F": "forward",
    "again": "further forward",
    "B": "backward",
    "W": "weight gradients",
    "U": "update",
}


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
