"""HangAnalysis: the likely cause of a hang, from the records of the ranks.

Invariant: works with neither torch nor MPI. The likely cause is a guess; everything else stands in
the records.

    record of rank 4: waits for rank 3           4 --> 3 --> 2   one edge per awaited rank; of a
    record of rank 3: in a mean of ranks 2, 3                    collective only ranks that are not
    record of rank 2: running for 611 s                          in it: the others have joined

    roots     ranks that wait for no rank: failed, silent or running     <- the likely cause
    blocked   waiting ranks from which edges lead to a root
    deadlock  waiting ranks from which no edges lead to a root

A run is stuck where a rank has failed, or has had no event for `STUCK_S` seconds. A rank with an
event between the two readings is not stuck.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

from dtrain.checkpoint.run_folder import FLIGHT_FOLDER, read_summary
from dtrain.checkpoint.safe_files import read_inside
from dtrain.errors import ConfigError
from dtrain.monitoring.flight_records import MAX_RECORD_BYTES, FlightRecord, read_records
from dtrain.monitoring.wait_graph import WaitGraph

STALE_S = 60.0
"""Age beyond the newest record from which a record belongs to an earlier request."""


STUCK_S = 10.0
"""Age of the last event from which a rank counts as stuck."""


@final
class HangAnalysis:
    """The graph of waits in the newest records of a run.

    Parameters
    ----------
    folder : Path
        The run folder.
    earlier : mapping of int to FlightRecord
        The records of an earlier reading, by rank.
    stuck_s : float
        As `STUCK_S`.

    Attributes
    ----------
    current_records, stale_records : dict of int to FlightRecord
        By rank: records of the latest request, and older ones.
    silent_ranks : list of int
        Ranks without a current record.
    graph : WaitGraph
        The waits of the current records.
    moved_ranks : set of int
        Ranks with an event since the earlier reading.

    Raises
    ------
    ConfigError
        The folder has no record.
    """

    def __init__(
        self,
        folder: Path,
        earlier: Mapping[int, FlightRecord] | None = None,
        stuck_s: float = STUCK_S,
    ) -> None:
        records = list(read_records(folder))
        status = (read_summary(folder) or {}).get("status")
        if not records and status in ("finished", "stopped"):
            raise ConfigError(
                "flight.not-running",
                f"nothing is stuck: the run in {folder} is {status}, and no rank wrote a record",
            )
        if not records:
            raise ConfigError(
                "flight.no-records",
                f"{folder / FLIGHT_FOLDER} has no record of a rank: signal the ranks first, with "
                "`scancel --signal=URG JOB`, or `kill -URG PID` of the process that started them",
            )
        self.folder = folder
        self.stuck_s = stuck_s
        self.newest_record = max(records, key=lambda record: record.written_s)
        self.world_size = max(int(record.fields["size"]) for record in records)
        self.current_records: dict[int, FlightRecord] = {}
        self.stale_records: dict[int, FlightRecord] = {}
        for record in records:
            age_s = self.newest_record.written_s - record.written_s
            target = self.current_records if age_s <= STALE_S else self.stale_records
            target[record.rank] = record
        self.silent_ranks = [
            rank for rank in range(self.world_size) if rank not in self.current_records
        ]
        waits = {rank: record.wait for rank, record in self.current_records.items()}
        self.graph = WaitGraph({rank: wait for rank, wait in waits.items() if wait is not None})
        self.moved_ranks = {
            rank
            for rank, before in (earlier or {}).items()
            if rank in self.current_records and _has_moved(before, self.current_records[rank])
        }

    def is_stuck(self) -> bool:
        """Return whether a rank has failed, or has had no event for `stuck_s` seconds."""
        return any(
            record.fields["failed"]
            or (rank not in self.moved_ranks and record.age_s >= self.stuck_s)
            for rank, record in self.current_records.items()
        )

    def roots(self) -> list[int]:
        """Return the ranks that wait for no other, the likeliest cause first.

        Failed ranks lead, then those that block most ranks, then those that have been longest
        without an event.
        """
        blocked = {rank: len(self.blocked_by(rank)) for rank in self._root_ranks()}
        return sorted(
            blocked,
            key=lambda rank: (not self.has_failed(rank), -blocked[rank], -self._idle_s(rank), rank),
        )

    def _root_ranks(self) -> set[int]:
        records = self.current_records.items()
        return {*self.silent_ranks, *(rank for rank, record in records if record.wait is None)}

    def blocked_by(self, root: int) -> set[int]:
        """Return the ranks that wait for `root`, directly or through other ranks."""
        return self.graph.blocked_by({root})

    def deadlocked_ranks(self) -> set[int]:
        """Return the waiting ranks that no root blocks."""
        return self.graph.deadlocked(self._root_ranks())

    def _idle_s(self, rank: int) -> float:
        record = self.current_records.get(rank)
        return float("inf") if record is None else float(record.fields["idle_s"])

    def has_failed(self, rank: int) -> bool:
        """Return whether the record of a rank is that of a failure."""
        return rank in self.current_records and bool(self.current_records[rank].fields["failed"])

    def stacks(self, rank: int) -> tuple[Path, str] | None:
        """Return the file with a rank's stacks and its text, None where it is missing or empty."""
        name = f"{FLIGHT_FOLDER}/rank-{rank:05d}.stacks"
        text = read_inside(self.folder, name, MAX_RECORD_BYTES, tail=True)
        return (self.folder / name, text) if text else None


def _has_moved(before: FlightRecord, after: FlightRecord) -> bool:
    """Return whether a rank had an event between two records."""
    between_s = float(after.fields["unix_s"]) - float(before.fields["unix_s"])
    return float(after.fields["idle_s"]) < between_s
