"""The docs of schedules agree with the code: every name, key and default.

Invariant: the docs of a schedule are a row in the table of all schedules and a section; a key has a
row ``| `key` | `default` | ... |`` in that section.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from dtrain.schedules import SCHEDULES
from dtrain.schema import kebab, toml_text
from tests.docs_reader import code_words, section, table_rows

DOCS = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text(encoding="utf-8")
KEYS = {code_words(row[0])[0]: code_words(row[-1]) for row in table_rows(DOCS, "| name | runs")}
"""The keys of each schedule, in the order of the table of all schedules."""


def test_every_schedule_has_a_row_and_a_section() -> None:
    assert [*KEYS] == [*SCHEDULES]
    assert all(section(DOCS, name) for name in SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_key_has_a_row_with_its_default(name: str) -> None:
    schedule_fields = fields(SCHEDULES[name])  # type: ignore[arg-type]
    assert KEYS[name] == [kebab(field.name) for field in schedule_fields]
    text = section(DOCS, name)
    rows = list(table_rows(text, "| key | default")) if KEYS[name] else []
    assert {code_words(row[0])[0]: row[1] for row in rows} == {
        kebab(field.name): f"`{toml_text(field.default)}`" for field in schedule_fields
    }
