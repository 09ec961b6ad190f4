"""The docs of schedules against the code: every name, key and default.

Invariant: a schedule is documented by a row of the table of all schedules and by a section; a key
by a row ``| `key` | `default` | ... |`` in that section.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from dtrain.schedules import SCHEDULES
from dtrain.tables import kebab, text
from tests.rule.test_docs import cells, ticked

DOCS = Path(__file__).parents[2] / "docs" / "schedules.md"


def listed() -> Iterator[list[str]]:
    """Yield the cells of the table of all schedules."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| name | runs"))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield cells(line)


def section(name: str) -> str:
    """Return the section about a schedule."""
    parts = re.split(r"^##+ ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    [told] = [part for part in parts if part.startswith(f"`{name}`\n")]
    return told


def test_every_schedule_has_a_row_and_a_section() -> None:
    assert [ticked(row[0])[0] for row in listed()] == [*SCHEDULES]
    assert all(section(name) for name in SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_key_is_told_with_its_default(name: str) -> None:
    [keys] = [ticked(row[-1]) for row in listed() if ticked(row[0])[0] == name]
    own = fields(SCHEDULES[name])  # type: ignore[arg-type]
    assert keys == [kebab(each.name) for each in own]
    rows = [cells(line) for line in section(name).splitlines() if line.startswith("| `")]
    told = {ticked(row[0])[0]: row[1] for row in rows}
    assert told == {kebab(each.name): f"`{text(each.default)}`" for each in own}
