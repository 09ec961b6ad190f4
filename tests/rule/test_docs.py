"""The docs of objectives against the code: every name, key and default, and the measured table.

Invariant: an objective is documented by a row of the table of all objectives and by a section; a
key by a row ``| `key` | `default` | ... |`` in that section, or in another where it is the same.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from dtrain.objectives import OBJECTIVES
from dtrain.schema import kebab, toml_text

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "objectives.md"


def ticked(cell: str) -> list[str]:
    """Return what stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def rows(docs: Path, head: str) -> Iterator[list[str]]:
    """Yield the cells of the rows of the table whose head starts so."""
    lines = docs.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(head))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield cells(line)


def section(docs: Path, name: str) -> str:
    """Return the section whose title is a name in ticks."""
    parts = re.split(r"^##+ ", docs.read_text(encoding="utf-8"), flags=re.MULTILINE)
    [told] = [part for part in parts if part.startswith(f"`{name}`\n")]
    return told


def cells(line: str) -> list[str]:
    """Return the cells of a row of a table."""
    return [each.strip() for each in line.strip().strip("|").split(" | ")]


def listed() -> dict[str, dict[str, str]]:
    """Return the rows of the table of all objectives, by name and column."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| name | a block learns"))
    names, rows = cells(lines[start]), {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        row = dict(zip(names, cells(line), strict=True))
        rows[row["name"].strip("`")] = row
    return rows


def sections() -> Iterator[tuple[list[str], str]]:
    """Yield the objectives that a section is about, and its text."""
    for part in re.split(r"^### ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, told = part.partition("\n")
        yield ticked(title), re.split(r"^## ", told, flags=re.MULTILINE)[0]


def defaults(told: str) -> dict[str, str]:
    """Return the default of each key that the tables of a text have a row for."""
    rows = (cells(line) for line in told.splitlines() if line.startswith("| `"))
    return {ticked(row[0])[0]: ticked(row[1])[0] for row in rows if ticked(row[1])}


def test_every_objective_has_a_row_and_a_section() -> None:
    assert sorted(listed()) == sorted(OBJECTIVES)
    assert sorted(name for names, _ in sections() for name in names) == sorted(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_row_says_what_the_code_does(name: str) -> None:
    kind, row = OBJECTIVES[name], listed()[name]
    assert ticked(row["keys"]) == [kebab(each.name) for each in fields(kind)]
    assert ticked(row["default schedule"]) == [kind().default_schedule]
    assert row["prediction"] == ("vote" if kind().predicts_by_vote else "last")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_key_is_told_with_its_default(name: str) -> None:
    [own] = [defaults(told) for names, told in sections() if name in names]
    others = defaultdict[str, set[str]](set)
    for _, told in sections():
        for key, default in defaults(told).items():
            others[key].add(default)
    for each in fields(OBJECTIVES[name]):
        key, wanted = kebab(each.name), toml_text(each.default)
        assert own[key] == wanted if key in own else wanted in others[key], key


def test_the_table_of_digits_is_that_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a new record: paste what `python benchmarks/objectives_digits.py --table` prints."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    digits = importlib.import_module("objectives_digits")
    wanted = "\n".join(digits.table(digits.RECORD))
    assert wanted in DOCS.read_text(encoding="utf-8")
