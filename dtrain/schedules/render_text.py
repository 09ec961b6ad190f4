"""Timeline of a proved schedule in plain characters.

Invariant: one row per stage and one column per unit of time (two, if the page is wide enough); all
rows have the same scale.

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
"""Characters of micro-batch 0: `F`, a later pass of it, `B` or `I`, and `W`."""


def timeline_text(report: ScheduleReport, width: int = 120) -> str:
    """Return the timeline as text: a row per stage, a legend and a summary.

    Parameters
    ----------
    report : ScheduleReport
        Result of `verify_schedule`.
    width : int
        Columns of the page; a longer timeline is cut and ends in "…".
    """
    stages = len(report.peak_live)
    names = [f"stage {stage:>{len(str(stages - 1))}} |" for stage in range(stages)]
    columns = width - len(names[0]) - 1
    gap = " " if 2 * report.makespan - 1 <= columns else ""
    rows = [["."] * report.makespan for _ in range(stages)]
    _fill(rows, report.timeline)
    lines = [
        name + _truncate(gap.join(row), columns) + "|"
        for name, row in zip(names, rows, strict=True)
    ]
    return "\n".join([*lines, _legend(report), _summary_line(report)])


def action_numbering(spans: Iterable[Span]) -> tuple[str, Callable[[Action], int]]:
    """Return the name and the function of the number that is drawn for an action.

    It is the micro-batch, or the update if every update has one micro-batch.
    """
    if all(span.action.micro <= 0 for span in spans):
        return "update", lambda action: action.update
    return "micro-batch", lambda action: action.micro


def _fill(rows: list[list[str]], spans: Sequence[Span]) -> None:
    """Write each action into its row; an update takes no time and overwrites the column before."""
    _, number = action_numbering(spans)
    for span in spans:
        start, end, action = int(span.start), int(span.end), span.action
        if action.kind == "U":
            rows[span.stage][max(start - 1, 0) : start or 1] = "U"
        else:
            symbol = chr(ord(_symbol(action)) + number(action) % 10)
            rows[span.stage][start:end] = symbol * (end - start)


def _symbol(action: Action) -> str:
    """Return the character of an action, as of micro-batch 0."""
    if action.kind == "F":
        return LATER_FORWARD if action.pass_ else FORWARD
    return WEIGHTS if action.kind == "W" else BACKWARD


def _legend(report: ScheduleReport) -> str:
    """Return the meanings of the characters."""
    symbols = {_symbol(span.action) for span in report.timeline if span.action.kind != "U"}
    is_split = WEIGHTS in symbols
    meanings = ["0 1 2 ... forward"]
    meanings += [f"a b c ... {'gradient of the input' if is_split else 'backward'}"]
    meanings += ["A B C ... of the weights"] if is_split else []
    meanings += ["k l m ... further forwards"] if LATER_FORWARD in symbols else []
    unit, _ = action_numbering(report.timeline)
    return f"{', '.join(meanings)} of {unit} 0, 1, 2 ... (modulo 10), U update, . idle"


def _truncate(row: str, width: int) -> str:
    """Return a row cut to `width` characters."""
    return row if len(row) <= width else row[: width - 1] + "…"


def _summary_line(report: ScheduleReport) -> str:
    """Return the costs of a report in one line."""
    is_split = any(span.action.kind == "W" for span in report.timeline)
    return (
        f"{report.makespan} units (F 1, {'I 1, W 1' if is_split else 'B 2'}), "
        f"bubble {report.bubble:.1%}, live micro-batches {_values_text(report.peak_live)}, "
        f"staleness {_values_text(report.staleness)}"
    )


def _values_text(values: tuple[int, ...]) -> str:
    """Return one number if all stages have the same, else one per stage."""
    return str(values[0]) if len(set(values)) == 1 else " ".join(map(str, values))
