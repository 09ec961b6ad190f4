"""Read the docs for tests: examples in Python, tables and sections."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def python_blocks(docs: Path) -> list[str]:
    """Return the Python examples of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", docs.read_text(encoding="utf-8"), re.M | re.S)


def load_example(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module `name` with this code; the current test can import it."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def table_rows(text: str, start: str) -> Iterator[list[str]]:
    """Yield the cells of the rows below the table head that begins with `start`."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(start))
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def section(text: str, name: str) -> str:
    """Return the section whose title is `name` in backticks."""
    parts = re.split(r"^##+ ", text, flags=re.MULTILINE)
    [content] = [part for part in parts if part.startswith(f"`{name}`\n")]
    return content


def code_words(cell: str) -> list[str]:
    """Return the texts in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def documented_laws(docs: Path) -> list[str]:
    """Return the laws of `dtrain.testing` that a page lists; there is at least one."""
    rows = table_rows(docs.read_text(encoding="utf-8"), "| law | what holds")
    laws = [law for law, *_ in rows for law in code_words(law)]
    assert laws
    return laws
