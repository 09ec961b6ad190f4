"""The docs of syncs against the code: every name, key and default.

Invariant: a sync is documented by a row of the table of all syncs and by a section; a key by a row
``| `key` | `default` | ... |`` in that section, `left out` where it has no default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from dtrain.syncs import SYNCS
from dtrain.tables import kebab, text
from tests.rule.test_docs import cells, ticked

DOCS = Path(__file__).parents[2] / "docs" / "communication.md"


def listed() -> Iterator[list[str]]:
    """Yield the cells of the table of all syncs."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| name | what is sent"))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield cells(line)


def section(name: str) -> str:
    """Return the section about a sync."""
    parts = re.split(r"^##+ ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    [told] = [part for part in parts if part.startswith(f"`{name}`\n")]
    return told


def test_every_sync_has_a_row_and_a_section() -> None:
    assert {ticked(row[0])[0] for row in listed()} == set(SYNCS)
    assert all(section(name) for name in SYNCS)


@pytest.mark.parametrize("name", SYNCS)
def test_every_key_is_told_with_its_default(name: str) -> None:
    [keys, *_] = [ticked(row[-1]) for row in listed() if ticked(row[0])[0] == name]
    assert keys == [kebab(each.name) for each in fields(SYNCS[name])]  # type: ignore[arg-type]
    rows = [cells(line) for line in section(name).splitlines() if line.startswith("| `")]
    told = {ticked(row[0])[0]: row[1] for row in rows}
    wanted = {
        kebab(each.name): "left out" if each.default is None else f"`{text(each.default)}`"
        for each in fields(SYNCS[name])  # type: ignore[arg-type]
    }
    assert told == wanted
