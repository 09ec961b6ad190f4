"""The docs of objectives against the code: every name, key and default, and the measured table.

Invariant: an objective is documented by a row of the table of all objectives and by a section; a
key by a row ``| `key` | `default` | ... |`` in that section, or in another if it is the same there.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dtrain.objectives import OBJECTIVES
from dtrain.schema import kebab, toml_text
from dtrain.tasks.task import Task

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "objectives.md"


def ticked(cell: str) -> list[str]:
    """Return the texts between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def rows(docs: Path, head: str) -> Iterator[list[str]]:
    """Yield the cells of the rows of the table whose head starts with `head`."""
    lines = docs.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(head))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield cells(line)


def section(docs: Path, name: str) -> str:
    """Return the section whose title is `name` in backticks."""
    parts = re.split(r"^##+ ", docs.read_text(encoding="utf-8"), flags=re.MULTILINE)
    [text] = [part for part in parts if part.startswith(f"`{name}`\n")]
    return text


def cells(line: str) -> list[str]:
    """Return the cells of a row of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


TASKS = {
    "any": (),
    "no counted positions": ("counted",),
    "one prediction per sample": ("counted", "positions"),
    "classes per sample": ("values", "positions"),
    "classes": ("values",),
    "classes, all alike": ("counted", "values"),
    "labels": ("counted", "values", "positions"),
}
"""The words of the column "tasks": kinds of task that an objective does not serve."""


EXAMPLES = {
    "counted": Task(ignore_index=7),
    "values": Task("mse").bind((2,), torch.float32, 2),
    "positions": Task().bind((4, 4), torch.int64, 3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_tasks_of_an_objective_are_those_that_it_serves(name: str) -> None:
    refused = {kind for kind, task in EXAMPLES.items() if OBJECTIVES[name]().serves(task)}
    assert refused == set(TASKS[table_of_all()[name]["tasks"]])
    assert OBJECTIVES[name]().serves(Task()) is None


def test_the_examples_of_tasks_are_tasks() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    tables = [
        tomllib.loads(block)["task"] for block in re.findall(r"```toml\n(.*?)```", text, re.S)
    ]
    assert [table.get("loss") for table in tables] == ["mse", None, "l1", "mytask:log_cosh"]
    for table in tables:
        Task.from_table(table, ROOT)


def table_of_all() -> dict[str, dict[str, str]]:
    """Return the rows of the table of all objectives, by name and column."""
    head = "| name | a block learns"
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    columns = cells(next(line for line in lines if line.startswith(head)))
    table = [dict(zip(columns, row, strict=True)) for row in rows(DOCS, head)]
    return {row["name"].strip("`"): row for row in table}


def sections() -> Iterator[tuple[list[str], str]]:
    """Yield the names of the objectives of a section, and its text."""
    for part in re.split(r"^### ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        yield ticked(title), re.split(r"^## ", text, flags=re.MULTILINE)[0]


def defaults(text: str) -> dict[str, str]:
    """Return the default of each key that has a row in the tables of a text."""
    key_rows = (cells(line) for line in text.splitlines() if line.startswith("| `"))
    return {ticked(row[0])[0]: ticked(row[1])[0] for row in key_rows if ticked(row[1])}


def test_every_objective_has_a_row_and_a_section() -> None:
    assert sorted(table_of_all()) == sorted(OBJECTIVES)
    assert sorted(name for names, _ in sections() for name in names) == sorted(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_row_agrees_with_the_code(name: str) -> None:
    kind, row = OBJECTIVES[name], table_of_all()[name]
    assert ticked(row["keys"]) == [kebab(field.name) for field in fields(kind)]
    assert ticked(row["default schedule"]) == [kind().default_schedule]
    assert row["prediction"] == ("vote" if kind().predicts_by_vote else "last")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_key_is_documented_with_its_default(name: str) -> None:
    [own_defaults] = [defaults(text) for names, text in sections() if name in names]
    all_defaults = defaultdict[str, set[str]](set)
    for _, text in sections():
        for key, default in defaults(text).items():
            all_defaults[key].add(default)
    for field in fields(OBJECTIVES[name]):
        key, default = kebab(field.name), toml_text(field.default)
        if key in own_defaults:
            assert own_defaults[key] == default, key
        else:
            assert default in all_defaults[key], key


def test_the_table_of_digits_is_that_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a new record: paste the output of `python benchmarks/objectives_digits.py --table`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    digits = importlib.import_module("objectives_digits")
    assert "\n".join(digits.table(digits.RECORD)) in DOCS.read_text(encoding="utf-8")
