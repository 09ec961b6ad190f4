"""`metrics.jsonl` in the run folder: one record per line, appended at every start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from dtrain.schema import Table
from dtrain.tracking.base import RunFacts, Tracker

METRICS_FILE = "metrics.jsonl"


@final
class MetricsFile(Tracker):
    """The tracker that every run has."""

    def __init__(self) -> None:
        self._path = Path(METRICS_FILE)

    def start(self, run: Table, facts: RunFacts) -> None:
        self._path = facts.folder / METRICS_FILE

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind, **values}, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
