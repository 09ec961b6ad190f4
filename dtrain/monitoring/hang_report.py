"""Hang report: the waits of a hanging run as a graph, from the records of its ranks.

Invariant: works with neither torch nor MPI. If all ranks are processes of this host, it requests
their records twice; else it reads the files. The likely cause is a guess; everything else stands
in the records.

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

import json
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, final

from dtrain.checkpoint.run_folder import FLIGHT_FOLDER, read_summary
from dtrain.comm.flight_recorder import format_ranks
from dtrain.errors import ConfigError
from dtrain.monitoring.flight_request import find_processes, request_records

STALE_S = 60.0
"""Age beyond the newest record from which a record belongs to an earlier request."""


STUCK_S = 10.0
"""Age of the last event from which a rank counts as stuck."""


READING_INTERVAL_S = 0.5
"""Seconds between two readings of the records of live ranks."""


MAX_SHOWN, MAX_WIDTH = 8, 30
"""Ranks that are shown one by one, and characters of a list of ranks."""


REQUIRED_KEYS = {"rank", "size", "unix_s", "wait_s", "failed", "idle_s"}
"""Keys that a readable record has."""


WaitKey = tuple[str, str]
"""Description and awaited ranks of a wait; ranks with equal keys are in the same collective."""


@final
@dataclass(frozen=True)
class FlightRecord:
    """The record of one rank; `comm.flight_recorder.RECORD_KEYS` explains its fields."""

    fields: Mapping[str, Any]
    path: Path

    @property
    def rank(self) -> int:
        """Rank in the world."""
        return int(self.fields["rank"])

    @property
    def wait(self) -> WaitKey | None:
        """The innermost wait; None where the rank waits for no other."""
        if self.fields["wait_s"] is None or self.fields["failed"]:
            return None
        return str(self.fields["what"]), str(self.fields["peers"])

    @property
    def age_s(self) -> float:
        """Seconds without an event, at least the age of the wait."""
        return max(float(self.fields["idle_s"]), float(self.fields["wait_s"] or 0.0))

    @property
    def time_text(self) -> str:
        """Time of writing, in this host's time zone."""
        return datetime.fromtimestamp(self.fields["unix_s"]).strftime("%H:%M:%S")


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
    waiting_ranks, awaited_ranks : dict of WaitKey to set of int
        By wait: ranks that are in it, and ranks that it lacks.
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
        records = list(_read_records(folder / FLIGHT_FOLDER))
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
        self.newest_record = max(records, key=lambda record: float(record.fields["unix_s"]))
        self.world_size = max(int(record.fields["size"]) for record in records)
        self.current_records: dict[int, FlightRecord] = {}
        self.stale_records: dict[int, FlightRecord] = {}
        for record in records:
            age_s = self.newest_record.fields["unix_s"] - record.fields["unix_s"]
            target = self.current_records if age_s <= STALE_S else self.stale_records
            target[record.rank] = record
        self.silent_ranks = [
            rank for rank in range(self.world_size) if rank not in self.current_records
        ]
        self.waiting_ranks: defaultdict[WaitKey, set[int]] = defaultdict(set)
        for rank, record in self.current_records.items():
            if record.wait is not None:
                self.waiting_ranks[record.wait].add(rank)
        self.awaited_ranks = {
            wait: parse_ranks(wait[1]) - ranks for wait, ranks in self.waiting_ranks.items()
        }
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
        return self._blocked_by({root})

    def deadlocked_ranks(self) -> set[int]:
        """Return the waiting ranks that no root blocks."""
        waiting = {rank for ranks in self.waiting_ranks.values() for rank in ranks}
        return waiting - self._blocked_by(self._root_ranks())

    def _blocked_by(self, roots: set[int]) -> set[int]:
        """Return the ranks from which edges lead to one of `roots`."""
        blocked: set[int] = set()
        new_ranks = roots
        while new_ranks:
            waits = [wait for wait, ranks in self.awaited_ranks.items() if ranks & new_ranks]
            new_ranks = {rank for wait in waits for rank in self.waiting_ranks[wait]} - blocked
            blocked |= new_ranks
        return blocked

    def _idle_s(self, rank: int) -> float:
        record = self.current_records.get(rank)
        return float("inf") if record is None else float(record.fields["idle_s"])

    def has_failed(self, rank: int) -> bool:
        """Return whether the record of a rank is that of a failure."""
        return rank in self.current_records and bool(self.current_records[rank].fields["failed"])

    def stacks_path(self, rank: int) -> Path | None:
        """Return the file with a rank's stacks, None where it is missing or empty."""
        path = self.folder / FLIGHT_FOLDER / f"rank-{rank:05d}.stacks"
        return path if path.is_file() and path.stat().st_size else None


def hang_report(folder: Path, stuck_s: float = STUCK_S) -> list[str]:
    """Return a few lines: waiting ranks, the likely cause, and what to do.

    If all ranks are processes of this host, it requests their records twice.

    Parameters
    ----------
    folder : Path
        The run folder.
    stuck_s : float
        As `STUCK_S`.

    Raises
    ------
    ConfigError
        The folder has no record.
    """
    earlier = _read_twice(folder)
    analysis = HangAnalysis(folder, earlier, stuck_s)
    newest, roots = analysis.newest_record, analysis.roots()
    names = _RankNames(analysis)
    lines = [
        f"records    {newest.time_text} ({newest.fields['why']}): "
        f"{len(analysis.current_records)} of {analysis.world_size} ranks answered"
        + (f", read twice within {READING_INTERVAL_S:g} s" if earlier else "")
    ]
    lines += [_root_line(analysis, rank, names) for rank in roots[:MAX_SHOWN]]
    if len(roots) > MAX_SHOWN:
        lines.append(f"           {len(roots) - MAX_SHOWN} more ranks that wait for no other")
    lines += _waiting_lines(analysis, roots)
    if not analysis.is_stuck():
        return [*lines, _healthy_line(analysis)]
    if deadlocked := analysis.deadlocked_ranks():
        lines.append(
            f"deadlock   {_ranks_text(deadlocked)} wait only for each other, or for messages that "
            "the network does not deliver"
        )
    return [*lines, *_conclusion_lines(analysis, roots, names)]


def _read_twice(folder: Path) -> dict[int, FlightRecord]:
    """Ask the ranks on this host twice; return the records of the first reading.

    Ranks on other hosts cannot be asked from here. Then the files of all ranks are compared, since
    they were written at one time.
    """
    hosts = _read_hosts(folder)
    processes = {} if set(hosts) - {socket.gethostname()} else find_processes(folder)
    if not processes:
        return {}
    answered = request_records(folder, processes)
    records = {record.rank: record for record in _read_records(folder / FLIGHT_FOLDER)}
    time.sleep(READING_INTERVAL_S)
    request_records(folder, processes)
    return {rank: record for rank, record in records.items() if rank in answered}


def _has_moved(before: FlightRecord, after: FlightRecord) -> bool:
    """Return whether a rank had an event between two records."""
    between_s = float(after.fields["unix_s"]) - float(before.fields["unix_s"])
    return float(after.fields["idle_s"]) < between_s


def _healthy_line(analysis: HangAnalysis) -> str:
    """Return the line of a run in which nothing is stuck."""
    oldest_s = max(record.age_s for record in analysis.current_records.values())
    moved = ""
    if analysis.moved_ranks:
        moved = (
            f"{len(analysis.moved_ranks)} of {analysis.world_size} ranks went on between two "
            "readings, and "
        )
    return (
        f"stuck      nothing is stuck: {moved}the longest time without an event is {oldest_s:.1f} "
        "s; if the run is slow, see slowest_rank in metrics.jsonl"
    )


def parse_ranks(text: str) -> set[int]:
    """Return the ranks in "0-3,8"."""
    ranks: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        ranks |= set(range(int(first), int(last or first) + 1))
    return ranks


def _read_records(folder: Path) -> Iterator[FlightRecord]:
    """Yield the readable records in a folder."""
    for path in sorted(folder.glob("rank-*.txt")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
            if fields.keys() >= REQUIRED_KEYS:
                yield FlightRecord(fields, path)
        except (OSError, ValueError, IndexError, AttributeError):
            continue


def _read_hosts(folder: Path) -> list[str]:
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


@final
class _RankNames:
    """Ranks with their hosts, from their records or from `metrics.jsonl`."""

    def __init__(self, analysis: HangAnalysis) -> None:
        self.records = analysis.stale_records | analysis.current_records
        self.hosts = _read_hosts(analysis.folder)

    def host(self, rank: int) -> str:
        """Return the host of a rank, empty where it is not known."""
        if rank in self.records:
            return str(self.records[rank].fields["host"])
        return self.hosts[rank] if rank < len(self.hosts) else ""

    def text(self, rank: int) -> str:
        """Return "rank 3 on n017"."""
        host = self.host(rank)
        return f"rank {rank} on {host}" if host else f"rank {rank}"


def _root_line(analysis: HangAnalysis, rank: int, names: _RankNames) -> str:
    """Return the line of a rank that waits for no other."""
    name, record = names.text(rank), analysis.current_records.get(rank)
    if record is None:
        return f"no answer  {name}: {_silent_rank_text(analysis, rank)}"
    fields = record.fields
    action = "no action yet" if fields["action"] is None else f"{fields['action']}"
    action += "" if fields["update"] is None else f" of update {fields['update']}"
    place = f", at {fields['place']}" if fields["place"] else ""
    if fields["failed"]:
        return f"failed     {name}: {fields['why']}, in {action}{place}"
    return f"running    {name}: {action} for {fields['idle_s']:.0f} s{place}"


def _silent_rank_text(analysis: HangAnalysis, rank: int) -> str:
    """Return the text of a rank without a current record."""
    stacks = analysis.stacks_path(rank)
    if stacks is not None:
        return f"inside compiled code, {_innermost_frame(stacks)} ({stacks})"
    if rank in analysis.stale_records:
        record = analysis.stale_records[rank]
        return (
            "ended, or inside compiled code; its last record is of "
            f"{record.time_text} ({record.path})"
        )
    earlier = sorted(analysis.folder.glob(f"{FLIGHT_FOLDER}-*/rank-{rank:05d}.txt"))
    if earlier:
        return f"ended, or not signalled; its last record is of an earlier attempt ({earlier[-1]})"
    return "ended, or not signalled; it has no record"


def _innermost_frame(stacks: Path) -> str:
    """Return the innermost line of the thread that handled the latest request."""
    lines = [line.strip() for line in stacks.read_text(encoding="utf-8").splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Current thread")]
    thread = lines[starts[-1] :] if starts else lines
    return next((line for line in thread if line.startswith("File ")), "no Python code")


def _waiting_lines(analysis: HangAnalysis, roots: Iterable[int]) -> list[str]:
    """Return the lines of the waiting ranks: the waits for a root, and the number of the others."""
    root_set = set(roots)
    count = sum(map(len, analysis.waiting_ranks.values()))
    if not count:
        return []
    direct: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for wait, awaited in analysis.awaited_ranks.items():
        if awaited & root_set:
            direct[_ranks_text(awaited & root_set), wait[0]] |= analysis.waiting_ranks[wait]
    waits = sorted(direct.items(), key=lambda item: -len(item[1]))
    lines = [f"waiting    {count} of {analysis.world_size} ranks"]
    for (awaited_text, description), ranks in waits[:MAX_SHOWN]:
        verb = "waits" if len(ranks) == 1 else "wait"
        lines.append(f"           {_ranks_text(ranks)} {verb} for {awaited_text}: {description}")
    if more := sum(len(ranks) for _, ranks in waits[MAX_SHOWN:]):
        lines.append(f"           {more} more ranks wait likewise")
    if indirect := count - sum(len(ranks) for _, ranks in waits):
        lines.append(f"           {indirect} more ranks wait for ranks that wait themselves")
    return lines


def _conclusion_lines(analysis: HangAnalysis, roots: list[int], names: _RankNames) -> Iterator[str]:
    """Yield the likely cause, where there is one, and what to do."""
    blocked = len(analysis.blocked_by(roots[0])) if roots else 0
    if roots and (blocked or analysis.has_failed(roots[0])):
        blocked_text = f"{blocked} of the other {analysis.world_size - 1} ranks wait for it"
        reason = f"{blocked_text}, directly or through other ranks" if blocked else "it failed"
        yield f"cause      likely {names.text(roots[0])}: {reason}"
        yield f"to do      {_advice(analysis, roots[0], names)}"
    elif analysis.deadlocked_ranks():
        yield (
            "to do      start the same command again; if it hangs again, report it with the folder "
            f"{analysis.folder / FLIGHT_FOLDER}: schedules are proven free of deadlock, so it is "
            "the network or a fault of dtrain"
        )
    else:
        oldest = max(
            analysis.current_records, key=lambda rank: analysis.current_records[rank].age_s
        )
        yield (
            f"to do      no rank waits for {names.text(oldest)}, which has had no event for "
            f"{analysis.current_records[oldest].age_s:.0f} s: {_advice(analysis, oldest, names)}"
        )


def _advice(analysis: HangAnalysis, rank: int, names: _RankNames) -> str:
    """Return what to do about the rank that is the likely cause."""
    record, host = analysis.current_records.get(rank), names.host(rank) or "its host"
    if record is not None and record.fields["failed"]:
        return (
            f"fix the error (traceback in {record.path}) and start the same command again: it "
            "resumes from the last checkpoint"
        )
    if record is not None:
        place = record.fields["place"] or "its stack"
        return (
            f"look at {place} (stack in {record.path}) and ask again in a minute: if the rank is "
            "still there, that code does not return"
        )
    if analysis.stacks_path(rank) is not None:
        return (
            f"check devices and file systems of {host}; end the job and start it again, without "
            "that host if it hangs there again"
        )
    return (
        f"check whether the rank still runs on {host}: the job's log and `sacct -j JOB` show a "
        "rank that was killed; start the same command again to resume"
    )


def _ranks_text(members: set[int]) -> str:
    """Return ranks as short text: "ranks 0-3,8"."""
    text = format_ranks(members)
    if len(text) > MAX_WIDTH:
        text = f"{text[:MAX_WIDTH].rpartition(',')[0]},... ({len(members)} in all)"
    return f"rank {text}" if len(members) == 1 else f"ranks {text}"
