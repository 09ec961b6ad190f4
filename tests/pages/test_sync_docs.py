"""docs/communication.md against the code: every sync, key and default.

Invariant: a sync is documented by a row of the table of all syncs and by a section; a key by a row
``| `key` | `default` | ... |`` in that section, `left out` where it has no default.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from dtrain.schema import kebab, toml_text
from dtrain.syncs import SYNCS
from tests.pages.test_docs import cells, rows, section, ticked

DOCS = Path(__file__).parents[2] / "docs" / "communication.md"
HEAD = "| name | what is sent"


def test_every_sync_has_a_row_and_a_section() -> None:
    assert {ticked(row[0])[0] for row in rows(DOCS, HEAD)} == set(SYNCS)
    assert all(section(DOCS, name) for name in SYNCS)


@pytest.mark.parametrize("name", SYNCS)
def test_every_key_is_documented_with_its_default(name: str) -> None:
    [keys, *_] = [ticked(row[-1]) for row in rows(DOCS, HEAD) if ticked(row[0])[0] == name]
    assert keys == [kebab(field.name) for field in fields(SYNCS[name])]
    lines = [cells(line) for line in section(DOCS, name).splitlines() if line.startswith("| `")]
    documented = {ticked(row[0])[0]: row[1] for row in lines}
    sync = SYNCS[name]()
    defaults = {kebab(field.name): getattr(sync, field.name) for field in fields(sync)}
    assert documented == {
        key: "left out" if default is None else f"`{toml_text(default)}`"
        for key, default in defaults.items()
    }
