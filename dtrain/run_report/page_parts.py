"""The parts that a page is made of: sections with charts, tables and sentences.

Invariant: plain values and figures; the template alone makes HTML of them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from dtrain.run_report import charts
from dtrain.run_report.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 16
"""Stages or ranks that a chart shows, and rows of a table that is not folded."""


@final
@dataclass(frozen=True)
class Chart:
    """A figure with its name, for a file, and the sentence that explains it."""

    name: str
    figure: Figure
    caption: str
    wide: bool = False

    @property
    def uri(self) -> str:
        """The figure as a data URI; an image runs no script."""
        data = base64.b64encode(charts.svg_text(self.figure).encode()).decode("ascii")
        return f"data:image/svg+xml;base64,{data}"


@final
@dataclass(frozen=True)
class TableView:
    """A table; a folded one shows its title only, until it is opened."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    note: str = ""
    labels: int = 1
    """Leading columns that hold text; the others hold numbers."""


@final
@dataclass
class Section:
    """A part of the page.

    Attributes
    ----------
    intro : str
        Words and purpose of the section, in plain words.
    notes : list of str
        Sentences below the charts.
    """

    anchor: str
    title: str
    intro: str
    charts: list[Chart] = field(default_factory=list)
    tables: list[TableView] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_chart(self, name: str, figure: Figure | None, caption: str, wide: bool = False) -> None:
        """Add a chart, if there is one."""
        if figure is not None:
            self.charts.append(Chart(f"{self.anchor}-{name}", figure, caption, wide))


Runs = Sequence[tuple[str, RunRecord]]
"""Runs with their names."""


def is_long(runs: Runs, rows: Sequence[object]) -> bool:
    """Return whether a table is folded: that of one of several runs, or one with many rows."""
    return len(runs) > 1 or len(rows) > MAX_ROWS
