"""Read numpydoc docstrings and write them as Markdown, for the reference pages.

Invariant: standard library only; the same docstring gives the same text.
"""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

FIELD_SECTIONS = ("Parameters", "Attributes")


class Item(NamedTuple):
    """One entry of a section: a parameter, a return value or an exception."""

    names: tuple[str, ...]
    kind: str
    text: str


class Docstring(NamedTuple):
    """The summary paragraph, the other paragraphs, and the sections by name."""

    summary: str
    body: str
    sections: dict[str, list[Item]]


def parse(text: str | None) -> Docstring:
    """Return the parts of a docstring."""
    lines = inspect.cleandoc(text or "").splitlines()
    heads = [i for i in range(len(lines) - 1) if re.fullmatch(r"-{3,}", lines[i + 1])]
    ends = [*heads[1:], len(lines)] if heads else []
    sections = {
        lines[head]: _items(lines[head + 2 : end]) for head, end in zip(heads, ends, strict=True)
    }
    prose = "\n".join(lines[: heads[0] if heads else len(lines)]).strip()
    summary, _, body = prose.partition("\n\n")
    return Docstring(" ".join(summary.split()), body.strip(), sections)


def _items(lines: list[str]) -> list[Item]:
    """Return the entries of a section; lines that are indented belong to the entry before."""
    items: list[Item] = []
    for line in lines:
        if line and not line.startswith(" "):
            names, _, kind = line.partition(" : ")
            items.append(Item(tuple(name.strip() for name in names.split(",")), kind, ""))
        elif items:
            items[-1] = items[-1]._replace(text=f"{items[-1].text} {line.strip()}".strip())
    return items


def field_texts(kind: type) -> dict[str, str]:
    """Return what the docstrings of a class and of its bases say about each field."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        sections = parse(each.__dict__.get("__doc__")).sections
        for name in FIELD_SECTIONS:
            for item in sections.get(name, []):
                texts.update(dict.fromkeys(item.names, item.text))
    return texts


def markdown(text: str) -> str:
    """Return prose of a docstring as Markdown: literals in single backticks, blocks in fences."""
    text = text.replace("``", "`")
    lines: list[str] = []
    in_block = False
    for line in text.splitlines():
        is_literal = line.startswith("    ")
        if is_literal and not in_block:
            lines += ["```text"]
        if in_block and line and not is_literal:
            while lines and not lines[-1]:
                lines.pop()
            lines += ["```", ""]
        in_block = (is_literal or (in_block and not line)) if line or in_block else False
        lines.append(line[4:] if is_literal else line.removesuffix(":") if line == "::" else line)
    if in_block:
        lines.append("```")
    return re.sub(r"::$", ":", "\n".join(lines), flags=re.M).strip()


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return markdown(text).replace("\n", " ").replace("|", "\\|")
