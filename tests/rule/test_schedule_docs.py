"""The docs of schedules against the code: every name, key and default.

Invariant: a schedule is documented by a row of the table of all schedules and by a section; a key
by a row ``| `key` | `default` | ... |`` in that section.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from dtrain.schedules import SCHEDULES
from dtrain.schema import kebab, toml_text
from tests.rule.test_docs import cells, rows, section, ticked

DOCS = Path(__file__).parents[2] / "docs" / "schedules.md"
HEAD = "| name | runs"


def test_every_schedule_has_a_row_and_a_section() -> None:
    assert [ticked(row[0])[0] for row in rows(DOCS, HEAD)] == [*SCHEDULES]
    assert all(section(DOCS, name) for name in SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_key_is_told_with_its_default(name: str) -> None:
    [keys] = [ticked(row[-1]) for row in rows(DOCS, HEAD) if ticked(row[0])[0] == name]
    own = fields(SCHEDULES[name])  # type: ignore[arg-type]
    assert keys == [kebab(each.name) for each in own]
    lines = [cells(line) for line in section(DOCS, name).splitlines() if line.startswith("| `")]
    told = {ticked(row[0])[0]: row[1] for row in lines}
    assert told == {kebab(each.name): f"`{toml_text(each.default)}`" for each in own}
