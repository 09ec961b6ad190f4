"""Flight records: read the records that the ranks of a run wrote.

Invariant: works with neither torch nor MPI. Records are compared by the times of their files, as
owners of run folders are: clocks of hosts may differ. Somebody else may have written the folder:
a record with values that no rank writes is left out, and no file outside of the folder is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, final

from dtrain.checkpoint.run_folder import FLIGHT_FOLDER
from dtrain.checkpoint.safe_files import (
    as_number,
    as_text,
    parse_json,
    read_inside,
    read_json_lines,
)
from dtrain.monitoring.wait_graph import Wait

MAX_RANKS = 10**5
"""Ranks of a world, at most."""


MAX_RECORD_BYTES = 2**22


PEERS = re.compile(r"(\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*)?")
"""World ranks, as "0-3,8"."""


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
        try:
            return datetime.fromtimestamp(self.written_s).strftime("%H:%M:%S")
        except (ValueError, OverflowError, OSError):  # a time that no clock shows
            return "??:??:??"


def read_records(folder: Path) -> Iterator[FlightRecord]:
    """Yield the readable records in a run folder."""
    for path in sorted((folder / FLIGHT_FOLDER).glob("rank-*.txt")):
        lines = read_inside(folder, f"{FLIGHT_FOLDER}/{path.name}", MAX_RECORD_BYTES).splitlines()
        fields = checked_fields(parse_json(lines[1])) if len(lines) > 1 else None
        if fields is None:
            continue
        with suppress(OSError):
            yield FlightRecord(fields, path, path.stat().st_mtime)


def checked_fields(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fields of a record with the types that a rank writes, None where that fails."""
    rank, size = fields.get("rank"), fields.get("size")
    numbers = {key: as_number(fields.get(key)) for key in ("unix_s", "wait_s", "idle_s")}
    if numbers["unix_s"] is None or numbers["idle_s"] is None or "failed" not in fields:
        return None
    if not (isinstance(rank, int) and isinstance(size, int) and 0 <= rank < size <= MAX_RANKS):
        return None
    if fields.get("wait_s") is not None and numbers["wait_s"] is None:
        return None
    texts = {key: as_text(str(fields.get(key) or "")) for key in ("host", "why", "what", "peers")}
    optional = {
        key: None if fields.get(key) is None else as_text(str(fields[key]))
        for key in ("update", "action", "place")
    }
    if not PEERS.fullmatch(texts["peers"]):
        return None
    ranks = {"rank": rank, "size": size, "failed": bool(fields["failed"])}
    return {**ranks, **numbers, **texts, **optional}


def read_hosts(folder: Path) -> list[str]:
    """Return the host of each rank in the latest attempt, empty where that is not recorded."""
    hosts: list[str] = []
    for record in read_json_lines(folder, "metrics.jsonl"):
        if record.get("kind") == "run" and isinstance(record.get("hosts"), list):
            hosts = [as_text(host) for host in record["hosts"][:MAX_RANKS]]
    return hosts
