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

from dtrain.errors import Refusal
from dtrain.folder import FLIGHT
from dtrain.telemetry import spans

LATE_S = 60.0
"""A record that is older than the newest by more is of an earlier question."""

SHOWN, WIDTH = 8, 30
"""Ranks that are told one by one, and letters of a list of ranks."""

Wait = tuple[str, str]
"""Words and ranks of a wait: who has both in common waits in the same collective."""


@final
@dataclass(frozen=True)
class Record:
    """What one rank wrote; `dtrain.telemetry.HERE` says what its values are."""

    here: Mapping[str, Any]
    path: Path

    @property
    def rank(self) -> int:
        """Of the world."""
        return int(self.here["rank"])

    @property
    def wait(self) -> Wait | None:
        """The innermost wait, None where it waits for nobody."""
        if self.here["wait_s"] is None or self.here["failed"]:
            return None
        return str(self.here["what"]), str(self.here["peers"])

    @property
    def clock(self) -> str:
        """When it was written, by this host's clock face."""
        return datetime.fromtimestamp(self.here["unix_s"]).strftime("%H:%M:%S")


@final
class Flights:
    """The records of one question, of all ranks that answered.

    Parameters
    ----------
    folder : Path
        The run folder.

    Raises
    ------
    Refusal
        It holds no record.
    """

    def __init__(self, folder: Path) -> None:
        found = list(_records(folder / FLIGHT))
        if not found:
            raise Refusal(
                f"{folder / FLIGHT} holds no record of a rank: ask the ranks first, with "
                "`scancel --signal=USR1 JOB` or `kill -USR1 PID` of what started them"
            )
        self.folder = folder
        self.newest = max(found, key=lambda each: float(each.here["unix_s"]))
        since = self.newest.here["unix_s"] - LATE_S
        self.size = max(int(each.here["size"]) for each in found)
        self.answers = {each.rank: each for each in found if each.here["unix_s"] >= since}
        self.late = {each.rank: each for each in found if each.here["unix_s"] < since}
        self.silent = [rank for rank in range(self.size) if rank not in self.answers]
        self.groups: defaultdict[Wait, set[int]] = defaultdict(set)
        for rank, answer in self.answers.items():
            if answer.wait is not None:
                self.groups[answer.wait].add(rank)
        self.awaited = {wait: ranks(wait[1]) - own for wait, own in self.groups.items()}

    def roots(self) -> list[int]:
        """Return the ranks that wait for nobody, the likeliest culprit first."""
        idle = {rank: each for rank, each in self.answers.items() if each.wait is None}
        weights = {rank: len(self.behind(rank)) for rank in self._longest([*self.silent, *idle])}
        return sorted(weights, key=lambda rank: (not self.failed(rank), -weights[rank]))

    def behind(self, root: int) -> set[int]:
        """Return the ranks that wait for `root`, directly or for others that do."""
        found: set[int] = set()
        fresh = {root}
        while fresh:
            told = [w for w, awaited in self.awaited.items() if awaited & fresh]
            fresh = {rank for wait in told for rank in self.groups[wait]} - found
            found |= fresh
        return found

    def stuck(self) -> set[int]:
        """Return the waiting ranks from which no chain leads to a root."""
        led = set(self.silent) | {r for r, each in self.answers.items() if each.wait is None}
        waiting = {rank for own in self.groups.values() for rank in own}
        while (
            fresh := {
                rank
                for wait, awaited in self.awaited.items()
                if awaited & led
                for rank in self.groups[wait]
            }
            - led
        ):
            led |= fresh
        return waiting - led

    def _longest(self, found: list[int]) -> list[int]:
        """Return the ranks longest in what they do first; those that failed or are silent lead."""
        return sorted(found, key=lambda rank: (not self.failed(rank), -self._idle_s(rank)))

    def _idle_s(self, rank: int) -> float:
        answer = self.answers.get(rank)
        return float("inf") if answer is None else float(answer.here["idle_s"])

    def failed(self, rank: int) -> bool:
        """Return whether a rank wrote that it failed."""
        return rank in self.answers and bool(self.answers[rank].here["failed"])


def told(folder: Path) -> list[str]:
    """Return, in a few lines, who waits for whom in a run, and who is the likely culprit."""
    flights = Flights(folder)
    newest, roots = flights.newest, flights.roots()
    hosts = _hosts(folder)
    lines = [
        f"asked      at {newest.clock} ({newest.here['why']}): "
        f"{len(flights.answers)} of {flights.size} ranks answered"
    ]
    lines += [_root(flights, rank, hosts) for rank in roots[:SHOWN]]
    if len(roots) > SHOWN:
        lines.append(f"           and {len(roots) - SHOWN} more that wait for nobody")
    lines += _waiting(flights, roots)
    if stuck := flights.stuck():
        lines.append(
            f"circle     {_several(stuck)} wait for each other and for nobody else: a deadlock, or "
            "messages that the network does not bring"
        )
    count = len(flights.behind(roots[0])) if roots else 0
    if roots and (count or flights.failed(roots[0])):
        lines.append(
            f"culprit    likely {_named(roots[0], flights, hosts)}: {count} of the other "
            f"{flights.size - 1} ranks wait for it, directly or in a chain"
        )
    return lines


def ranks(words: str) -> set[int]:
    """Return the ranks in "0-3,8"."""
    found: set[int] = set()
    for part in filter(None, words.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _records(folder: Path) -> Iterator[Record]:
    """Yield the records in a folder; what is damaged is none."""
    for path in sorted(folder.glob("rank-*.txt")):
        try:
            here = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
            if {"rank", "size", "unix_s", "wait_s", "failed", "idle_s"} <= here.keys():
                yield Record(here, path)
        except (OSError, ValueError, IndexError, AttributeError):
            continue


def _hosts(folder: Path) -> list[str]:
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


def _named(rank: int, flights: Flights, hosts: list[str]) -> str:
    """Return a rank and its host."""
    known = flights.answers.get(rank) or flights.late.get(rank)
    host = known.here["host"] if known is not None else hosts[rank] if rank < len(hosts) else ""
    return f"rank {rank} on {host}" if host else f"rank {rank}"


def _root(flights: Flights, rank: int, hosts: list[str]) -> str:
    """Return the line of a rank that waits for nobody."""
    who, answer = _named(rank, flights, hosts), flights.answers.get(rank)
    if answer is None:
        return f"no answer  {who}: {_trace(flights, rank)}"
    here = answer.here
    doing = "no action yet" if here["action"] is None else f"{here['action']}"
    doing += "" if here["update"] is None else f" of update {here['update']}"
    place = f", at {here['place']}" if here["place"] else ""
    if here["failed"]:
        return f"failed     {who}: {here['why']}, in {doing}{place}"
    return f"at work    {who}: {doing} for {here['idle_s']:.0f} s{place}"


def _trace(flights: Flights, rank: int) -> str:
    """Return what is known of a rank that did not answer."""
    stacks = flights.folder / FLIGHT / f"rank-{rank:05d}.stacks"
    if stacks.is_file() and stacks.stat().st_size:
        return f"inside compiled code, {_innermost(stacks)} ({stacks})"
    if rank in flights.late:
        late = flights.late[rank]
        return f"gone, or inside compiled code; its last record is of {late.clock} ({late.path})"
    earlier = sorted(flights.folder.glob(f"{FLIGHT}-*/rank-{rank:05d}.txt"))
    if earlier:
        return f"gone, or not asked; its last record is of an earlier attempt ({earlier[-1]})"
    return "gone, or not asked; it left no record"


def _innermost(stacks: Path) -> str:
    """Return the innermost line of the thread that was asked last."""
    lines = [line.strip() for line in stacks.read_text(encoding="utf-8").splitlines()]
    heads = [number for number, line in enumerate(lines) if line.startswith("Current thread")]
    below = lines[heads[-1] :] if heads else lines
    return next((line for line in below if line.startswith("File ")), "no Python code")


def _waiting(flights: Flights, roots: Iterable[int]) -> list[str]:
    """Return the lines of those who wait: for what from a root, and how many for others."""
    idle = set(roots)
    count = sum(map(len, flights.groups.values()))
    direct: defaultdict[str, set[int]] = defaultdict(set)
    for wait, awaited in flights.awaited.items():
        if lacks := awaited & idle:
            direct[f"{wait[0]}; awaits {_several(lacks)}"] |= flights.groups[wait]
    kinds = sorted(direct.items(), key=lambda kind: -len(kind[1]))
    found = [f"           {_several(own)}: {what}" for what, own in kinds[:SHOWN]]
    if more := sum(len(own) for _, own in kinds[SHOWN:]):
        found.append(f"           {more} more, likewise")
    if rest := count - sum(len(own) for _, own in kinds):
        found.append(f"           {rest} for ranks that wait themselves")
    return [f"waiting    {count} of {flights.size} ranks", *found] if count else []


def _several(found: set[int]) -> str:
    """Return ranks in a few words."""
    told = spans(found)
    if len(told) > WIDTH:
        told = f"{told[:WIDTH].rpartition(',')[0]},... ({len(found)} in all)"
    return f"rank {told}" if len(found) == 1 else f"ranks {told}"
