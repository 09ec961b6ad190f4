"""Hang report: the lines of `dtrain flight` on a run that seems to hang.

Invariant: works with neither torch nor MPI. If all ranks are processes of this host, it requests
their records twice; else it reads the files.
"""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import final

from dtrain.checkpoint.run_folder import FLIGHT_FOLDER
from dtrain.comm.flight_recorder import format_ranks
from dtrain.monitoring.flight_records import FlightRecord, read_hosts, read_records
from dtrain.monitoring.flight_request import find_processes, request_records
from dtrain.monitoring.hang_analysis import STUCK_S, HangAnalysis

READING_INTERVAL_S = 0.5
"""Seconds between two readings of the records of live ranks."""


MAX_SHOWN, MAX_WIDTH = 8, 30
"""Ranks that are shown one by one, and characters of a list of ranks."""


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
    hosts = read_hosts(folder)
    processes = {} if set(hosts) - {socket.gethostname()} else find_processes(folder)
    if not processes:
        return {}
    answered = request_records(folder, processes)
    records = {record.rank: record for record in read_records(folder)}
    time.sleep(READING_INTERVAL_S)
    request_records(folder, processes)
    return {rank: record for rank, record in records.items() if rank in answered}


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


@final
class _RankNames:
    """Ranks with their hosts, from their records or from `metrics.jsonl`."""

    def __init__(self, analysis: HangAnalysis) -> None:
        self.records = analysis.stale_records | analysis.current_records
        self.hosts = read_hosts(analysis.folder)

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
    stacks = analysis.stacks(rank)
    if stacks is not None:
        path, text = stacks
        return f"inside compiled code, {_innermost_frame(text)} ({path})"
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


def _innermost_frame(stacks: str) -> str:
    """Return the innermost line of the thread that handled the latest request."""
    lines = [line.strip() for line in stacks.splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Current thread")]
    thread = lines[starts[-1] :] if starts else lines
    return next((line for line in thread if line.startswith("File ")), "no Python code")


def _waiting_lines(analysis: HangAnalysis, roots: Iterable[int]) -> list[str]:
    """Return the lines of the waiting ranks: the waits for a root, and the number of the others."""
    root_set = set(roots)
    count = sum(map(len, analysis.graph.waiting.values()))
    if not count:
        return []
    direct: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for wait, awaited in analysis.graph.awaited.items():
        if awaited & root_set:
            direct[_ranks_text(awaited & root_set), wait.description] |= analysis.graph.waiting[
                wait
            ]
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
    if analysis.stacks(rank) is not None:
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
