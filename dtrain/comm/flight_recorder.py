"""Telemetry: the flight recorder, what a rank did last and what it waits for now.

Invariant: recording formats nothing and never waits; an event is a tuple in a ring, and becomes
words only where somebody asks.

    note("action", F3.0, "update", 17)      note("send", ...)      note("waited", 0.02, ...)
                     |                            |                        |
                     v                            v                        v
    ring of the last 512   [ ... | 12.310 action | 12.311 send | 12.331 waited ]  -->  text()

A record is a file for people, whose second line is one JSON object, `HERE`, for programs that read
the records of many ranks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, final

MAX_EVENTS = 512
"""Events that are kept."""


Pending = tuple[float, str]
"""Since when (`time.perf_counter`), and what is outstanding."""


OpenWait = tuple[float, str, Sequence[int]]
"""Since when, for what, and for which ranks of the world."""


RECORD_KEYS = (
    *("rank", "size", "host", "unix_s", "why", "update", "action", "failed"),
    *("wait_s", "what", "peers", "idle_s", "place"),
)
"""What the JSON line of a record tells: who and when; in which update and action; whether the rank
has failed; the innermost wait (None: it is in none), its words, and the ranks that it is for
("0-3,8"); the age of the last event; and the innermost line of the program outside libraries."""


StackSource = FrameType | BaseException | None
"""What has a stack."""


@final
class FlightRecorder:
    """What one rank did last, and what it waits for.

    Parameters
    ----------
    name : str
        Who this is, in words.
    number, size : int
        World rank, for the name of the file, and the ranks of the world.
    host : str
        Where it runs.

    Attributes
    ----------
    waits : list of Wait
        The waits that this rank is in now, the innermost last.
    sources : list of callable
        Each tells what is outstanding: messages under way and receives that were posted.
    folder : Path or None
        Where `dump` writes; None: to stderr.
    """

    def __init__(
        self, name: str = "this process", rank: int = 0, size: int = 1, host: str = ""
    ) -> None:
        self.name, self.rank, self.size, self.host = name, rank, size, host
        self.open_waits: list[OpenWait] = []
        self.pending_sources: list[Callable[[], Iterable[Pending]]] = []
        self.folder: Path | None = None
        self._failure_recorded = False
        self._signal: int | None = None
        self._stack_file: TextIO | None = None
        self._events: deque[tuple[float, str, tuple[object, ...]]] = deque(maxlen=MAX_EVENTS)

    def note(self, kind: str, *facts: object) -> None:
        """Record an event; `facts` must not change later, since they are put into words later."""
        self._events.append((time.perf_counter(), kind, facts))

    def dump_on_signal(self, signal_number: int) -> None:
        """Write a record on this signal, from now on. Main thread only."""
        faulthandler.unregister(signal_number)  # else it takes the place of a later one
        signal.signal(signal_number, lambda number, at: self.dump(signal.Signals(number).name, at))
        self._signal = signal_number

    def set_folder(self, folder: Path) -> None:
        """Write into `folder` from now on; never raise.

        Where this rank listens to a signal, that writes its threads' stacks to `rank-NNNNN.stacks`,
        too, from C: so a rank that does not come back to Python is seen as well.
        """
        self.folder = folder
        if self._signal is None:
            return
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            self._stack_file = self._path("stacks").open("w", encoding="utf-8")
            faulthandler.register(self._signal, self._stack_file, all_threads=True, chain=True)

    def close(self) -> None:
        """Leave the folder, and nothing in it that is empty; never raise."""
        if self._stack_file is not None and self._signal is not None:
            faulthandler.unregister(self._signal)
            with suppress(OSError):
                self._stack_file.close()
                if not self._path("stacks").stat().st_size:
                    self._path("stacks").unlink()
                self._path("stacks").parent.rmdir()  # where it is empty
        self._stack_file = None

    def text(self, reason: str = "asked", stack_source: StackSource = None) -> str:
        """Return everything in words, for a person.

        Parameters
        ----------
        why : str
            What made somebody ask.
        place : frame or exception, optional
            Where the program is, or how it failed; the stack is told, too.
        """
        now = time.perf_counter()
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        head = f"{self.name}, process {os.getpid()}, at {stamp}: {' '.join(reason.split())}"
        here = json.dumps(self._record_fields(now, reason, stack_source))
        told = [
            *self._current_lines(now, isinstance(stack_source, BaseException)),
            *self._event_lines(now),
        ]
        return "\n".join([head, here, "", *told, *_stack_lines(stack_source), ""])

    def dump(self, reason: str = "asked", stack_source: StackSource = None) -> None:
        """Write `text` to `rank-NNNNN.txt` in `folder`, or to stderr; never raise.

        A file appears whole or not at all, and replaces the one before it; only the record of a
        failure is never replaced by what comes after, when others end this rank.
        """
        if self._failure_recorded and not isinstance(stack_source, BaseException):
            return
        self._failure_recorded = isinstance(stack_source, BaseException)
        try:
            text = self.text(reason, stack_source)
            if self.folder is None:
                print(text, file=sys.stderr, flush=True)
                return
            self.folder.mkdir(exist_ok=True)
            draft = self._path("part")
            draft.write_text(text, encoding="utf-8")
            draft.replace(self._path("txt"))
        except Exception as error:  # who looks at a run must not end it
            print_error(f"dtrain: no flight record of {self.name}: {error}")

    def warn_slow_wait(self, seconds: float, description: str) -> None:
        """Say that a wait has lasted for long, where there is a folder for records; end nothing."""
        if self.folder is None:
            return
        self.dump(f"no message for {seconds:g} s", sys._getframe(1))
        if self.rank == 0:
            print_error(
                f"dtrain: {self.name} has waited {seconds:g} s for {description}, and waits on: see "
                f"{self._path('txt')}; `dtrain flight {self.folder.parent}` says who waits for "
                "whom, docs/comm.md how to ask all ranks"
            )

    def _path(self, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / f"rank-{self.rank:05d}.{suffix}"

    def _record_fields(self, now: float, reason: str, stack_source: StackSource) -> dict[str, Any]:
        """Return what `HERE` names."""
        events = list(self._events)
        act = next((facts for _, kind, facts in reversed(events) if kind == "action"), ())
        since, what, peers = self.open_waits[-1] if self.open_waits else (None, None, ())
        idle = now - events[-1][0] if events else 0.0
        wait = None if since is None else round(now - since, 3)
        failed, action = isinstance(stack_source, BaseException), str(act[0]) if act else None
        who = (self.rank, self.size, self.host, round(time.time(), 3), reason)
        did = (act[2] if len(act) > 2 else None, action, failed)
        does = (wait, what, format_ranks(peers), round(idle, 3), _innermost_line(stack_source))
        return dict(zip(RECORD_KEYS, (*who, *did, *does), strict=True))

    def _current_lines(self, now: float, has_failed: bool) -> Iterator[str]:
        for since, what, _ in self.open_waits:
            yield f"waits for {now - since:.3f} s for {what}"
        if not self.open_waits:
            last = self._events[-1][0] if self._events else now
            state = "has failed" if has_failed else "is in no wait: it is at work"
            yield f"{state}; its last event is {now - last:.3f} s old"
        pending = sorted(entry for source in self.pending_sources for entry in source())
        yield ""
        yield f"outstanding: {len(pending)}"
        for since, what in pending:
            yield f"  {now - since:10.3f} s  {what}"

    def _event_lines(self, now: float) -> Iterator[str]:
        yield ""
        yield f"last events: {len(self._events)}, seconds ago"
        for when, kind, facts in list(self._events):
            yield f"  {now - when:10.3f}  {kind:9} {' '.join(map(_format_fact, facts))}".rstrip()


def dump_stacks_on(signal_number: int) -> None:
    """Print all stacks on this signal, until a rank has a `Flight` that listens to it."""
    signal.signal(signal_number, signal.SIG_IGN)  # what `listen` finds for a moment
    if sys.__stderr__ is not None:
        faulthandler.register(signal_number, sys.__stderr__, all_threads=True)


def print_error(message: str) -> None:
    """Print to stderr where that is possible: a full disk must not hide what is told, or done,
    next."""
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)


def flush_output() -> None:
    """Write out what was printed, where that is possible."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def format_ranks(ranks: Iterable[int]) -> str:
    """Return ranks in few words: "0-3,8"."""
    found = sorted(set(ranks))
    breaks = [i for i, (a, b) in enumerate(pairwise(found), 1) if b != a + 1]
    runs = [found[i:j] for i, j in pairwise([0, *breaks, len(found)])] if found else []
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _format_fact(fact: object) -> str:
    return f"{fact:.6f} s" if isinstance(fact, float) else str(fact)


def _stack_lines(stack_source: StackSource) -> Iterator[str]:
    if stack_source is None:
        return
    yield ""
    yield "stack"
    if isinstance(stack_source, BaseException):
        lines = traceback.format_exception(stack_source)
    else:
        lines = traceback.format_stack(stack_source)
    yield from "".join(lines).splitlines()


def _innermost_line(stack_source: StackSource) -> str | None:
    """Return the innermost line outside libraries: file, line, function."""
    if stack_source is None:
        return None
    if isinstance(stack_source, BaseException):
        stack = traceback.extract_tb(stack_source.__traceback__)
    else:
        stack = traceback.extract_stack(stack_source)
    own = [each for each in stack if "site-packages" not in each.filename] or list(stack)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}" if own else None
