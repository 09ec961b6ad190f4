"""Read files of a run folder that somebody else may have written.

Invariant: no file outside of the folder is read, whatever links it holds, and nothing of it is
executed. A missing, unreadable, too large or damaged file is None, or its readable lines.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Table = dict[str, Any]


MAX_BYTES = 64 * 2**20
"""Largest file that is read whole; of a longer log the end is read."""


MAX_ITEMS, MAX_CHARACTERS = 4096, 4000
"""Items of a list and characters of a text that are kept."""


MAX_NUMBER = 1e100
"""Largest number that is kept; charts add and scale numbers."""


def read_inside(folder: Path, name: str, limit: int = MAX_BYTES, *, tail: bool = False) -> str:
    """Return the text of a regular file inside of `folder`, empty where there is none.

    Parameters
    ----------
    limit : int
        Bytes that are read at most.
    tail : bool
        Read the whole lines in the last `limit` bytes of a longer file, which is left out
        otherwise.
    """
    try:
        root = folder.resolve(strict=True)
        path = (root / name).resolve(strict=True)
        if not path.is_relative_to(root):
            return ""
        # Without O_NONBLOCK the opening of a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or (status.st_size > limit and not tail):
                return ""
            if status.st_size > limit:
                file.seek(status.st_size - limit)
                file.readline()
            return file.read(limit).decode("utf-8", "replace")
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a circle of links
        return ""


def read_json(folder: Path, name: str) -> Table:
    """Return the object in a JSON file, empty where there is none."""
    return parse_json(read_inside(folder, name))


def read_json_lines(folder: Path, name: str, limit: int = MAX_BYTES) -> Iterator[Table]:
    """Yield the objects of a file that has one per line; a comma may follow each."""
    for line in read_inside(folder, name, limit, tail=True).split("\n"):
        if table := parse_json(line.strip().rstrip(",")):
            yield table


def read_toml(folder: Path, name: str) -> Table:
    """Return the tables of a TOML file, empty where it is missing or damaged."""
    try:
        return tomllib.loads(read_inside(folder, name))
    except (ValueError, RecursionError):
        return {}


def parse_json(text: str) -> Table:
    """Return the object of a JSON text, empty for anything else."""
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def as_number(value: object) -> float | None:
    """Return a number that can be drawn, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -MAX_NUMBER <= value <= MAX_NUMBER else None  # false for NaN


def as_count(value: object) -> int | None:
    """Return a whole number from 0, None for anything else."""
    number = as_number(value)
    return None if number is None or number < 0 else int(number)


def as_numbers(value: object) -> list[float | None]:
    """Return the numbers of a list, None for other items; empty for anything but a list."""
    return [as_number(item) for item in value[:MAX_ITEMS]] if isinstance(value, list) else []


def as_text(value: object) -> str:
    """Return a text without control characters, empty for anything but a text."""
    if not isinstance(value, str):
        return ""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in value[:MAX_CHARACTERS])
    return text.strip()


def as_table(value: object) -> Table:
    """Return a table, empty for anything else."""
    return value if isinstance(value, dict) else {}
