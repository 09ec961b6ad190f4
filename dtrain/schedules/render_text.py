"""Draw the timeline of a proved schedule in plain characters.

Invariant: one row per stage, one column (or two, where there is room) per unit of time, the same
unit in the same column of every row.

    stage 0 |0 1 2 3 . . . . . . a a b b c c d U|
    stage 1 |. 0 1 2 3 . . . a a b b c c d U . .|
    stage 2 |. . 0 1 2 3 a a b b c c d U . . . .|
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dtrain.schedules.actions import Action
from dtrain.schedules.simulator import Span
from dtrain.schedules.verify import ScheduleReport

FORWARD, LATER_FORWARD, BACKWARD, WEIGHTS = "0", "k", "a", "A"
"""What micro-batch 0 is written as: `F`, a later pass of it, `B` or `I`, and `W`."""


def timeline_text(report: ScheduleReport, width: int = 120) -> str:
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
    lines = [
        name + _truncate(gap.join(row), room) + "|" for name, row in zip(names, rows, strict=True)
    ]
    return "\n".join([*lines, _legend(report), _summary_line(report)])


def action_numbering(spans: Iterable[Span]) -> tuple[str, Callable[[Action], int]]:
    """Return what actions are numbered by, and how: micro-batches, or updates of one each."""
    if all(span.action.micro <= 0 for span in spans):
        return "update", lambda action: action.update
    return "micro-batch", lambda action: action.micro


def _fill(rows: list[list[str]], spans: Sequence[Span]) -> None:
    """Write each action into its row; an update takes no time and marks the column it ends."""
    _, number = action_numbering(spans)
    for span in spans:
        start, end, action = int(span.start), int(span.end), span.action
        if action.kind == "U":
            rows[span.stage][max(start - 1, 0) : start or 1] = "U"
        else:
            sign = chr(ord(_symbol(action)) + number(action) % 10)
            rows[span.stage][start:end] = sign * (end - start)


def _symbol(action: Action) -> str:
    """Return what an action of micro-batch 0 is written as."""
    if action.kind == "F":
        return LATER_FORWARD if action.pass_ else FORWARD
    return WEIGHTS if action.kind == "W" else BACKWARD


def _legend(report: ScheduleReport) -> str:
    """Return what the signs of a timeline mean."""
    seen = {_symbol(span.action) for span in report.timeline if span.action.kind != "U"}
    split = WEIGHTS in seen
    words = ["0 1 2 ... forward", f"a b c ... {'gradient of the input' if split else 'backward'}"]
    words += ["A B C ... of the weights"] if split else []
    words += ["k l m ... further forwards"] if LATER_FORWARD in seen else []
    what, _ = action_numbering(report.timeline)
    return f"{', '.join(words)} of {what} 0, 1, 2 ... (modulo 10), U update, . idle"


def _truncate(row: str, width: int) -> str:
    """Return a row cut to the room there is."""
    return row if len(row) <= width else row[: width - 1] + "…"


def _summary_line(report: ScheduleReport) -> str:
    """Return the figures of a report in one line."""
    split = any(span.action.kind == "W" for span in report.timeline)
    return (
        f"{report.makespan} units (F 1, {'I 1, W 1' if split else 'B 2'}), "
        f"bubble {report.bubble:.1%}, live micro-batches {_values_text(report.peak_live)}, "
        f"staleness {_values_text(report.staleness)}"
    )


def _values_text(values: tuple[int, ...]) -> str:
    """Return one number where all stages agree, else all of them."""
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))
