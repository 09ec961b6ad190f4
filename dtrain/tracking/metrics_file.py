"""`metrics.jsonl` in the run folder: one record per line, appended at every start.

Invariant: a line is written by one call of the kernel. What a run left of a line whose writing was
cut short is removed at the next start.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from dtrain.schema import Table
from dtrain.tracking.base import RunFacts, Tracker

METRICS_FILE = "metrics.jsonl"


BLOCK_BYTES = 1 << 16
"""Bytes that are searched at once for the end of the last line."""


@final
class MetricsFile(Tracker):
    """The tracker that every run has."""

    def __init__(self) -> None:
        self._path = Path(METRICS_FILE)

    def start(self, run: Table, facts: RunFacts) -> None:
        self._path = facts.folder / METRICS_FILE
        remove_torn_line(self._path)

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind, **values}, allow_nan=False).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def remove_torn_line(path: Path) -> None:
    """Remove the end of a file after its last complete line."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position:
            start = max(0, position - BLOCK_BYTES)
            file.seek(start)
            last = file.read(position - start).rfind(b"\n")
            if last >= 0:
                position = start + last + 1
                break
            position = start
        if position < end:
            file.truncate(position)
