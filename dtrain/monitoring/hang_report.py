"""Flights: who waits for whom in a run that hangs, from the records of its ranks.

Invariant: reads what ranks wrote and nothing else: neither torch nor MPI, and no rank is asked. It
may be wrong about who is guilty, never about what it read.

    record of rank 4: waits for rank 3           4 --> 3 --> 2   an edge per rank waited for; of a
    record of rank 3: waits for a mean of 2, 3                   group only those that do not wait
    record of rank 2: at work for 611 s                          for the same: the others have come

    roots     ranks that wait for nobody: failed, silent, at work      <- one of them is the culprit
    behind    the waiting ranks from which edges lead to a root
    circles   waiting ranks from which edges lead to no root
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, final

from dtrain.checkpoint.run_folder import FLIGHT_FOLDER
from dtrain.comm.flight_recorder import format_ranks
from dtrain.errors import ConfigError

STALE_S = 60.0
"""A record that is older than the newest by more is of an earlier question."""


MAX_SHOWN, MAX_WIDTH = 8, 30
"""Ranks that are told one by one, and letters of a list of ranks."""


WaitKey = tuple[str, str]
"""Words and ranks of a wait: who has both in common waits in the same collective."""


@final
@dataclass(frozen=True)
class FlightRecord:
    """What one rank wrote; `dtrain.telemetry.HERE` says what its values are."""

    fields: Mapping[str, Any]
    path: Path

    @property
    def rank(self) -> int:
        """Of the world."""
        return int(self.fields["rank"])

    @property
    def wait(self) -> WaitKey | None:
        """The innermost wait, None where it waits for nobody."""
        if self.fields["wait_s"] is None or self.fields["failed"]:
            return None
        return str(self.fields["what"]), str(self.fields["peers"])

    @property
    def time_text(self) -> str:
        """When it was written, by this host's clock face."""
        return datetime.fromtimestamp(self.fields["unix_s"]).strftime("%H:%M:%S")


@final
class HangAnalysis:
    """The records of one question, of all ranks that answered.

    Parameters
    ----------
    folder : Path
        The run folder.

    Raises
    ------
    DtrainError
        It holds no record.
    """

    def __init__(self, folder: Path) -> None:
        found = list(_read_records(folder / FLIGHT_FOLDER))
        if not found:
            raise ConfigError(
                "todo.key",
                f"{folder / FLIGHT_FOLDER} holds no record of a rank: ask the ranks first, with "
                "`scancel --signal=USR1 JOB` or `kill -USR1 PID` of what started them",
            )
        self.folder = folder
        self.newest_record = max(found, key=lambda each: float(each.fields["unix_s"]))
        since = self.newest_record.fields["unix_s"] - STALE_S
        self.world_size = max(int(each.fields["size"]) for each in found)
        self.current_records = {each.rank: each for each in found if each.fields["unix_s"] >= since}
        self.stale_records = {each.rank: each for each in found if each.fields["unix_s"] < since}
        self.silent_ranks = [
            rank for rank in range(self.world_size) if rank not in self.current_records
        ]
        self.waiting_ranks: defaultdict[WaitKey, set[int]] = defaultdict(set)
        for rank, answer in self.current_records.items():
            if answer.wait is not None:
                self.waiting_ranks[answer.wait].add(rank)
        self.awaited_ranks = {
            wait: parse_ranks(wait[1]) - own for wait, own in self.waiting_ranks.items()
        }

    def roots(self) -> list[int]:
        """Return the ranks that wait for nobody, the likeliest culprit first."""
        idle = {rank: each for rank, each in self.current_records.items() if each.wait is None}
        weights = {
            rank: len(self.blocked_by(rank))
            for rank in self._by_idle_time([*self.silent_ranks, *idle])
        }
        return sorted(weights, key=lambda rank: (not self.has_failed(rank), -weights[rank]))

    def blocked_by(self, root: int) -> set[int]:
        """Return the ranks that wait for `root`, directly or for others that do."""
        found: set[int] = set()
        fresh = {root}
        while fresh:
            told = [w for w, awaited in self.awaited_ranks.items() if awaited & fresh]
            fresh = {rank for wait in told for rank in self.waiting_ranks[wait]} - found
            found |= fresh
        return found

    def deadlocked_ranks(self) -> set[int]:
        """Return the waiting ranks from which no chain leads to a root."""
        led = set(self.silent_ranks) | {
            r for r, each in self.current_records.items() if each.wait is None
        }
        waiting = {rank for own in self.waiting_ranks.values() for rank in own}
        while (
            fresh := {
                rank
                for wait, awaited in self.awaited_ranks.items()
                if awaited & led
                for rank in self.waiting_ranks[wait]
            }
            - led
        ):
            led |= fresh
        return waiting - led

    def _by_idle_time(self, candidates: list[int]) -> list[int]:
        """Return the ranks longest in what they do first; those that failed or are silent lead."""
        return sorted(candidates, key=lambda rank: (not self.has_failed(rank), -self._idle_s(rank)))

    def _idle_s(self, rank: int) -> float:
        answer = self.current_records.get(rank)
        return float("inf") if answer is None else float(answer.fields["idle_s"])

    def has_failed(self, rank: int) -> bool:
        """Return whether a rank wrote that it failed."""
        return rank in self.current_records and bool(self.current_records[rank].fields["failed"])


def hang_report(folder: Path) -> list[str]:
    """Return, in a few lines, who waits for whom in a run, and who is the likely culprit."""
    flights = HangAnalysis(folder)
    newest, roots = flights.newest_record, flights.roots()
    hosts = _read_hosts(folder)
    lines = [
        f"asked      at {newest.time_text} ({newest.fields['why']}): "
        f"{len(flights.current_records)} of {flights.world_size} ranks answered"
    ]
    lines += [_root_line(flights, rank, hosts) for rank in roots[:MAX_SHOWN]]
    if len(roots) > MAX_SHOWN:
        lines.append(f"           and {len(roots) - MAX_SHOWN} more that wait for nobody")
    lines += _waiting_lines(flights, roots)
    if stuck := flights.deadlocked_ranks():
        lines.append(
            f"circle     {_ranks_text(stuck)} wait for each other and for nobody else: a deadlock, or "
            "messages that the network does not bring"
        )
    count = len(flights.blocked_by(roots[0])) if roots else 0
    if roots and (count or flights.has_failed(roots[0])):
        lines.append(
            f"culprit    likely {_rank_text(roots[0], flights, hosts)}: {count} of the other "
            f"{flights.world_size - 1} ranks wait for it, directly or in a chain"
        )
    return lines


def parse_ranks(text: str) -> set[int]:
    """Return the ranks in "0-3,8"."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _read_records(folder: Path) -> Iterator[FlightRecord]:
    """Yield the records in a folder; what is damaged is none."""
    for path in sorted(folder.glob("rank-*.txt")):
        try:
            here = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
            if {"rank", "size", "unix_s", "wait_s", "failed", "idle_s"} <= here.keys():
                yield FlightRecord(here, path)
        except (OSError, ValueError, IndexError, AttributeError):
            continue


def _read_hosts(folder: Path) -> list[str]:
    """Return the host of each rank, as the latest attempt recorded them; none where it did not."""
    hosts: list[str] = []
    try:
        with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
            for line in file:
                if '"kind": "run"' in line:
                    hosts = list(json.loads(line).get("hosts", ()))
    except (OSError, ValueError):
        pass
    return hosts


def _rank_text(rank: int, analysis: HangAnalysis, hosts: list[str]) -> str:
    """Return a rank and its host."""
    known = analysis.current_records.get(rank) or analysis.stale_records.get(rank)
    host = known.fields["host"] if known is not None else hosts[rank] if rank < len(hosts) else ""
    return f"rank {rank} on {host}" if host else f"rank {rank}"


def _root_line(analysis: HangAnalysis, rank: int, hosts: list[str]) -> str:
    """Return the line of a rank that waits for nobody."""
    who, answer = _rank_text(rank, analysis, hosts), analysis.current_records.get(rank)
    if answer is None:
        return f"no answer  {who}: {_silent_rank_text(analysis, rank)}"
    here = answer.fields
    doing = "no action yet" if here["action"] is None else f"{here['action']}"
    doing += "" if here["update"] is None else f" of update {here['update']}"
    place = f", at {here['place']}" if here["place"] else ""
    if here["failed"]:
        return f"failed     {who}: {here['why']}, in {doing}{place}"
    return f"at work    {who}: {doing} for {here['idle_s']:.0f} s{place}"


def _silent_rank_text(analysis: HangAnalysis, rank: int) -> str:
    """Return what is known of a rank that did not answer."""
    stacks = analysis.folder / FLIGHT_FOLDER / f"rank-{rank:05d}.stacks"
    if stacks.is_file() and stacks.stat().st_size:
        return f"inside compiled code, {_innermost_frame(stacks)} ({stacks})"
    if rank in analysis.stale_records:
        late = analysis.stale_records[rank]
        return (
            f"gone, or inside compiled code; its last record is of {late.time_text} ({late.path})"
        )
    earlier = sorted(analysis.folder.glob(f"{FLIGHT_FOLDER}-*/rank-{rank:05d}.txt"))
    if earlier:
        return f"gone, or not asked; its last record is of an earlier attempt ({earlier[-1]})"
    return "gone, or not asked; it left no record"


def _innermost_frame(stacks: Path) -> str:
    """Return the innermost line of the thread that was asked last."""
    lines = [line.strip() for line in stacks.read_text(encoding="utf-8").splitlines()]
    heads = [number for number, line in enumerate(lines) if line.startswith("Current thread")]
    below = lines[heads[-1] :] if heads else lines
    return next((line for line in below if line.startswith("File ")), "no Python code")


def _waiting_lines(analysis: HangAnalysis, roots: Iterable[int]) -> list[str]:
    """Return the lines of those who wait: for what from a root, and how many for others."""
    idle = set(roots)
    count = sum(map(len, analysis.waiting_ranks.values()))
    direct: defaultdict[str, set[int]] = defaultdict(set)
    for wait, awaited in analysis.awaited_ranks.items():
        if lacks := awaited & idle:
            direct[f"{wait[0]}; awaits {_ranks_text(lacks)}"] |= analysis.waiting_ranks[wait]
    kinds = sorted(direct.items(), key=lambda kind: -len(kind[1]))
    found = [f"           {_ranks_text(own)}: {what}" for what, own in kinds[:MAX_SHOWN]]
    if more := sum(len(own) for _, own in kinds[MAX_SHOWN:]):
        found.append(f"           {more} more, likewise")
    if rest := count - sum(len(own) for _, own in kinds):
        found.append(f"           {rest} for ranks that wait themselves")
    return [f"waiting    {count} of {analysis.world_size} ranks", *found] if count else []


def _ranks_text(members: set[int]) -> str:
    """Return ranks in a few words."""
    told = format_ranks(members)
    if len(told) > MAX_WIDTH:
        told = f"{told[:MAX_WIDTH].rpartition(',')[0]},... ({len(members)} in all)"
    return f"rank {told}" if len(members) == 1 else f"ranks {told}"
