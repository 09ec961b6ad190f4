"""The docs of syncs against the code: every name, key and default.

Invariant: a sync is documented by a row of the table of all syncs and by a section; a key by a row
``| `key` | `default` | ... |`` in that section, `left out` where it has no default.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from dtrain.schema import kebab, toml_text
from dtrain.syncs import SYNCS
from tests.rule.test_docs import cells, rows, section, ticked

DOCS = Path(__file__).parents[2] / "docs" / "communication.md"
HEAD = "| name | what is sent"


def test_every_sync_has_a_row_and_a_section() -> None:
    assert {ticked(row[0])[0] for row in rows(DOCS, HEAD)} == set(SYNCS)
    assert all(section(DOCS, name) for name in SYNCS)


@pytest.mark.parametrize("name", SYNCS)
def test_every_key_is_told_with_its_default(name: str) -> None:
    [keys, *_] = [ticked(row[-1]) for row in rows(DOCS, HEAD) if ticked(row[0])[0] == name]
    assert keys == [kebab(each.name) for each in fields(SYNCS[name])]  # type: ignore[arg-type]
    lines = [cells(line) for line in section(DOCS, name).splitlines() if line.startswith("| `")]
    told = {ticked(row[0])[0]: row[1] for row in lines}
    made = SYNCS[name]()
    defaults = {kebab(each.name): getattr(made, each.name) for each in fields(made)}  # type: ignore[arg-type]
    wanted = {k: "left out" if v is None else f"`{toml_text(v)}`" for k, v in defaults.items()}
    assert told == wanted
