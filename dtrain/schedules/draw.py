"""Draw the timeline of a proved schedule in plain characters.

Invariant: one row per stage, one column (or two, where there is room) per unit of time, the same
unit in the same column of every row.

    stage 0 |0 1 2 3 . . . . . . a a b b c c d U|
    stage 1 |. 0 1 2 3 . . . a a b b c c d U . .|
    stage 2 |. . 0 1 2 3 a a b b c c d U . . . .|
"""

from __future__ import annotations

from collections.abc import Iterable

from dtrain.schedules.check import Report
from dtrain.schedules.simulate import Span

LEGEND = (
    "0 1 2 ... forward, a b c ... backward of micro-batch 0, 1, 2 ... (modulo 10), U update, . idle"
)


def draw(report: Report, width: int = 120) -> str:
    """Return the timeline as text: a row per stage, a legend and the figures.

    Parameters
    ----------
    report : Report
        What `check` returned.
    width : int
        Columns of the page; a longer timeline ends in "…".
    """
    stages = len(report.peak_live)
    names = [f"stage {stage:>{len(str(stages - 1))}} |" for stage in range(stages)]
    room = width - len(names[0]) - 1
    gap = " " if 2 * report.makespan - 1 <= room else ""
    rows = [["."] * report.makespan for _ in range(stages)]
    _fill(rows, report.timeline)
    lines = [name + _fit(gap.join(row), room) + "|" for name, row in zip(names, rows, strict=True)]
    return "\n".join([*lines, LEGEND, _figures(report)])


def _fill(rows: list[list[str]], spans: Iterable[Span]) -> None:
    """Write each action into its row; an update takes no time and marks the column it ends."""
    for stage, start, end, action in spans:
        if action.kind == "U":
            rows[stage][max(start - 1, 0) : start or 1] = "U"
            continue
        base = "0" if action.kind == "F" else "a"
        rows[stage][start:end] = chr(ord(base) + action.micro % 10) * (end - start)


def _fit(row: str, room: int) -> str:
    """Return a row cut to the room there is."""
    return row if len(row) <= room else row[: room - 1] + "…"


def _figures(report: Report) -> str:
    """Return the figures of a report in one line."""
    return (
        f"{report.makespan} units (F 1, B 2), bubble {report.bubble:.1%}, "
        f"live micro-batches {_runs(report.peak_live)}, staleness {_runs(report.staleness)}"
    )


def _runs(values: tuple[int, ...]) -> str:
    """Return one number where all stages agree, else all of them."""
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))
