"""The timeline of a plan as a picture: SVG, a row per stage.

Invariant: the same spans give the same file; lengths are times, nothing is rounded to columns.

    stage 0  [F0][F1]        [  B0  ]|[  B1  ]|        | is an update
    stage 1      [F0][  B0  ]|[F1][  B1  ]|
             0        2         4         6   units
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dtrain.schedules.actions import INPUT_GRADIENT_KINDS, Action
from dtrain.schedules.render_text import action_numbering
from dtrain.schedules.simulator import Span

COLOURS = {"F": "#a9cfe5", "again": "#cfe5a9", "B": "#2a6f97", "I": "#2a6f97", "W": "#7fb069"}


LABELS = {
    "F": "forward",
    "again": "further forward",
    "B": "backward",
    "I": "gradient of the input",
    "W": "of the weights",
}


ROW, BAR, LEFT, TOP, FOOT = 30, 22, 80, 36, 64


MIN_WIDTH, MAX_WIDTH = 600, 2400
"""Widths of the timeline, in pixels."""


UNIT_PIXELS = 16
"""Pixels of a unit, where the width allows it."""


def timeline_svg(
    timeline: Sequence[Span], stages: int, title: str, unit: str = "units", per_unit: float = 1.0
) -> str:
    """Return a timeline as the text of an SVG file.

    Parameters
    ----------
    timeline : sequence of Span
        What stages do, and when.
    title : str
        What stands above it.
    unit : str
        What times are in; `per_unit` of it are one forward or thereabouts, for the scale.
    """
    end = max((float(span.end) for span in timeline), default=0.0) or 1.0
    wide = min(max(UNIT_PIXELS * end / per_unit, MIN_WIDTH), MAX_WIDTH)
    scale, below = wide / end, TOP + ROW * stages
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + wide + 20:.0f}" '
        f'height="{below + FOOT}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for stage in range(stages):
        y = TOP + ROW * stage
        lines.append(f'<text x="8" y="{y + 16}">stage {stage}</text>')
        lines.append(f'<rect x="{LEFT}" y="{y}" width="{wide:.1f}" height="{BAR}" fill="#f2f2f2"/>')
    what, number = action_numbering(timeline)
    for span in timeline:
        if span.action.kind != "U":
            lines += _bar(span, scale, str(number(span.action)))
    lines += [_update_mark(span, scale) for span in timeline if span.action.kind == "U"]
    lines += _axis(end, scale, below, unit)
    lines += _legend(timeline, below, what)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bar(span: Span, scale: float, number: str) -> list[str]:
    """Return one action as a bar, with its words for who points at it."""
    action, (x, y) = span.action, _corner(span, scale)
    width = scale * (span.end - span.start)
    told = f"{action} of update {action.update}: {span.start:g} to {span.end:g}"
    lines = [
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{BAR}" '
        f'fill="{COLOURS[_colour_key(action)]}" stroke="white" stroke-width="0.5">'
        f"<title>{escape(told)}</title></rect>"
    ]
    if width >= 8 * len(number):
        colour = "white" if action.kind in INPUT_GRADIENT_KINDS else "black"
        lines.append(
            f'<text x="{x + width / 2:.2f}" y="{y + 15}" text-anchor="middle" font-size="10" '
            f'fill="{colour}" pointer-events="none">{number}</text>'
        )
    return lines


def _update_mark(span: Span, scale: float) -> str:
    """Return an update as a mark at its end; it may take no time at all."""
    x, y = _corner(span, scale)
    width = max(2.0, scale * (span.end - span.start))
    told = f"{span.action} of update {span.action.update}: at {span.end:g}"
    return (
        f'<rect x="{x - (width == 2.0):.2f}" y="{y - 2}" width="{width:.2f}" height="{BAR + 4}" '
        f'fill="#c1121f"><title>{escape(told)}</title></rect>'
    )


def _corner(span: Span, scale: float) -> tuple[float, int]:
    return LEFT + scale * span.start, TOP + ROW * span.stage


def _axis(end: float, scale: float, bottom: int, unit: str) -> list[str]:
    """Return marks at round times, four to ten of them."""
    whole = 10.0 ** math.floor(math.log10(end))
    step = whole / (5 if end < 2 * whole else 2 if end < 5 * whole else 1)
    lines = []
    for tick in (number * step for number in range(math.floor(end / step) + 1)):
        x = LEFT + scale * tick
        lines.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" '
            'stroke="black" stroke-opacity="0.1"/>'
        )
        lines.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    return [*lines, f'<text x="8" y="{bottom + 14}">{escape(unit)}</text>']


def _legend(timeline: Sequence[Span], bottom: int, numbering: str) -> list[str]:
    """Return what the colours mean, of those that are there."""
    seen = {_colour_key(span.action) for span in timeline if span.action.kind != "U"}
    split = "W" in seen
    lines, x, y = [], LEFT, bottom + 34
    for kind in (kind for kind in COLOURS if kind in seen):
        lines.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLOURS[kind]}"/>')
        word = LABELS["I" if split and kind == "B" else kind]
        lines.append(f'<text x="{x + 20}" y="{y + 12}">{word}</text>')
        x += 40 + 7 * len(word)
    lines.append(f'<rect x="{x}" y="{y}" width="3" height="14" fill="#c1121f"/>')
    return [*lines, f'<text x="{x + 10}" y="{y + 12}">update (numbers: {numbering})</text>']


def _colour_key(action: Action) -> str:
    return "again" if action.kind == "F" and action.pass_ else action.kind
