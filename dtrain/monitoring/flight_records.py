"""Flight records: read the records that the ranks of a run wrote.

Invariant: works with neither torch nor MPI. Records are compared by the times of their files, as
owners of run folders are: clocks of hosts may differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, final

from dtrain.monitoring.wait_graph import Wait

REQUIRED_KEYS = {"rank", "size", "unix_s", "wait_s", "failed", "idle_s"}
"""Keys that a readable record has."""


@final
@dataclass(frozen=True)
class FlightRecord:
    """The record of one rank; `comm.flight_recorder.RECORD_KEYS` explains its fields.

    Attributes
    ----------
    written_s : float
        Time of its file.
    """

    fields: Mapping[str, Any]
    path: Path
    written_s: float

    @property
    def rank(self) -> int:
        """Rank in the world."""
        return int(self.fields["rank"])

    @property
    def wait(self) -> Wait | None:
        """The innermost wait; None where the rank waits for no other."""
        if self.fields["wait_s"] is None or self.fields["failed"]:
            return None
        return Wait(str(self.fields["what"]), str(self.fields["peers"]))

    @property
    def age_s(self) -> float:
        """Seconds without an event, at least the age of the wait."""
        return max(float(self.fields["idle_s"]), float(self.fields["wait_s"] or 0.0))

    @property
    def time_text(self) -> str:
        """Time of the file, in this host's time zone."""
        return datetime.fromtimestamp(self.written_s).strftime("%H:%M:%S")


def read_records(folder: Path) -> Iterator[FlightRecord]:
    """Yield the readable records in a folder."""
    for path in sorted(folder.glob("rank-*.txt")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
            if fields.keys() >= REQUIRED_KEYS:
                yield FlightRecord(fields, path, path.stat().st_mtime)
        except (OSError, ValueError, IndexError, AttributeError):
            continue


def read_hosts(folder: Path) -> list[str]:
    """Return the host of each rank in the latest attempt, empty where that is not recorded."""
    hosts: list[str] = []
    try:
        with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
            for line in file:
                if '"kind": "run"' in line:
                    hosts = list(json.loads(line).get("hosts", ()))
    except (OSError, ValueError):
        pass
    return hosts
