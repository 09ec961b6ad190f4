"""FlightRecorder: the last events of a rank, and what it waits for now.

Invariant: recording formats nothing and never waits. An event is a tuple in a ring buffer, and is
formatted only when a record is written.

    note("action", F3.0, "update", 17)      note("send", ...)      note("waited", 0.02, ...)
                     |                            |                        |
                     v                            v                        v
    ring of the last 512   [ ... | 12.310 action | 12.311 send | 12.331 waited ]  -->  text()

A record is a text file for people. Its second line is one JSON object, a `Record`, for programs
that read the records of many ranks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TextIO, TypedDict, final

from dtrain.comm.stacks import StackSource, innermost_line, stack_lines, thread_lines

FLIGHT_SIGNAL = signal.SIGURG
"""Signal on which a rank writes its record. A process without a handler ignores it, and launchers
pass it on."""


MAX_EVENTS = 512
"""Length of the ring buffer."""


Pending = tuple[float, str]
"""Start (`time.perf_counter`) and description of a transfer or collective in flight."""


OpenWait = tuple[float, str, Sequence[int]]
"""Start and description of a wait, and the world ranks that it waits for."""


class Record(TypedDict):
    """The JSON line of a record.

    Attributes
    ----------
    rank, size, host : int, int, str
        World rank, number of ranks, and host.
    unix_s, why : float, str
        Time and reason of the record.
    update, action : int or None, str or None
        Of the last action.
    failed : bool
        Whether the rank has failed.
    wait_s, what, peers : float or None, str or None, str
        Age and description of the innermost wait (None: the rank is in no wait), and the world
        ranks that it waits for ("0-3,8").
    idle_s : float
        Age of the last event.
    place : str or None
        The innermost line of the program outside libraries.
    """

    rank: int
    size: int
    host: str
    unix_s: float
    why: str
    update: object
    action: str | None
    failed: bool
    wait_s: float | None
    what: str | None
    peers: str
    idle_s: float
    place: str | None


RECORD_KEYS = tuple(Record.__annotations__)


@final
class FlightRecorder:
    """The last events of one rank, and what it waits for.

    Parameters
    ----------
    name : str
        Description of the rank, for people.
    rank, size : int
        World rank, for the name of the file, and number of ranks of the world.
    host : str
        Host of the rank.

    Attributes
    ----------
    open_waits : list of OpenWait
        The waits that this rank is in now, the innermost last.
    pending_sources : list of callable
        Each yields the messages in flight and the posted receives of some groups.
    folder : Path or None
        Folder of the file that `dump` writes; None: `dump` writes to stderr.
    section : str or None
        The part of the run that this rank is in: "start", "update", ...; None: outside of a run.
    """

    def __init__(
        self, name: str = "this process", rank: int = 0, size: int = 1, host: str = ""
    ) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self.host = host
        self.open_waits: list[OpenWait] = []
        self.pending_sources: list[Callable[[], Iterable[Pending]]] = []
        self.folder: Path | None = None
        self.section: str | None = None
        self._is_final = False
        self._signal: int | None = None
        self._stack_file: TextIO | None = None
        self._events: deque[tuple[float, str, tuple[object, ...]]] = deque(maxlen=MAX_EVENTS)

    def note(self, kind: str, *facts: object) -> None:
        """Record an event; `facts` must not change later, since they are formatted later."""
        self._events.append((time.perf_counter(), kind, facts))

    def enter(self, section: str | None) -> None:
        """Begin a section of the run."""
        self.section = section
        self.note("section", section)

    @contextmanager
    def in_section(self, section: str) -> Iterator[None]:
        """Run the body in a section, and return to the one before it."""
        previous = self.section
        self.enter(section)
        try:
            yield
        finally:
            self.enter(previous)

    def last_event_s(self) -> float:
        """Return the time of the last event, by `time.perf_counter`; any thread may call it."""
        try:
            return self._events[-1][0]
        except IndexError:
            return 0.0

    def last_action(self) -> tuple[object, ...]:
        """Return the facts of the last action, empty where there is none."""
        events = list(self._events)
        return next((facts for _, kind, facts in reversed(events) if kind == "action"), ())

    def dump_on_signal(self, signal_number: int) -> None:
        """Write a record on this signal, from now on. Main thread only."""
        faulthandler.unregister(signal_number)  # else it replaces the one that `set_folder` sets

        def handle(number: int, frame: FrameType | None) -> None:
            self.dump(signal.Signals(number).name, frame)

        signal.signal(signal_number, handle)
        self._signal = signal_number

    def set_folder(self, folder: Path) -> None:
        """Write into `folder` from now on; never raise.

        The signal of `dump_on_signal` then also writes the stacks of all threads to
        `rank-NNNNN.stacks`, from C, so it works in a rank that does not return to Python.
        """
        self.folder = folder
        if self._signal is None:
            return
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            self._stack_file = self._path("stacks").open("w", encoding="utf-8")
            faulthandler.register(self._signal, self._stack_file, all_threads=True, chain=True)

    def detach(self) -> None:
        """Write no file of this rank from now on: the process is a fork of it."""
        if self._signal is not None:
            faulthandler.unregister(self._signal)
        if self._stack_file is not None:
            self._stack_file.close()
        self.folder = self._signal = self._stack_file = None

    def close(self) -> None:
        """Close the files and delete those that are empty; never raise."""
        if self._stack_file is not None and self._signal is not None:
            faulthandler.unregister(self._signal)
            with suppress(OSError):
                self._stack_file.close()
                if not self._path("stacks").stat().st_size:
                    self._path("stacks").unlink()
                self._path("stacks").parent.rmdir()  # fails unless it is empty
        self._stack_file = None

    def text(self, reason: str = "requested", stack_source: StackSource = None) -> str:
        """Return the record as text.

        Parameters
        ----------
        reason : str
            Why the record is written.
        stack_source : frame or exception, optional
            Current frame of the program, or the error that ended it; the record shows its stack.
        """
        now = time.perf_counter()
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        head = f"{self.name}, process {os.getpid()}, at {stamp}: {' '.join(reason.split())}"
        record = json.dumps(self._record(now, reason, stack_source))
        lines = [
            *self._current_lines(now, isinstance(stack_source, BaseException)),
            *self._event_lines(now),
            *stack_lines(stack_source),
        ]
        return "\n".join([head, record, "", *lines, ""])

    def dump(
        self,
        reason: str = "requested",
        stack_source: StackSource = None,
        *,
        is_final: bool = False,
    ) -> None:
        """Write `text` to `rank-NNNNN.txt` in `folder`, or to stderr; never raise.

        The file appears complete or not at all, and replaces an older one. The record of a failure,
        and one that `is_final`, is not replaced by that of the signal with which other ranks then
        end this one.
        """
        has_failed = isinstance(stack_source, BaseException)
        if self._is_final and not has_failed:
            return
        self._is_final = has_failed or is_final
        try:
            text = self.text(reason, stack_source)
            if isinstance(stack_source, FrameType) and is_final:
                text += "\n".join(thread_lines(stack_source))
            if self.folder is None:
                print(text, file=sys.stderr, flush=True)
                return
            self.folder.mkdir(exist_ok=True)
            draft = self._path("part")
            draft.write_text(text, encoding="utf-8")
            draft.replace(self._path("txt"))
        except Exception as error:  # a record that fails must not end the run
            print_error(f"dtrain: no flight record of {self.name}: {error}")

    def _path(self, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / f"rank-{self.rank:05d}.{suffix}"

    def _record(self, now: float, reason: str, stack_source: StackSource) -> Record:
        action, last_s = self.last_action(), self.last_event_s()
        start, description, peers = self.open_waits[-1] if self.open_waits else (None, None, ())
        return Record(
            rank=self.rank,
            size=self.size,
            host=self.host,
            unix_s=round(time.time(), 3),
            why=reason,
            update=action[2] if len(action) > 2 else None,
            action=str(action[0]) if action else None,
            failed=isinstance(stack_source, BaseException),
            wait_s=None if start is None else round(now - start, 3),
            what=description,
            peers=format_ranks(peers),
            idle_s=round(now - last_s if last_s else 0.0, 3),
            place=innermost_line(stack_source),
        )

    def _current_lines(self, now: float, has_failed: bool) -> Iterator[str]:
        for start, description, _ in self.open_waits:
            yield f"waits for {now - start:.3f} s for {description}"
        if not self.open_waits:
            last = self._events[-1][0] if self._events else now
            state = "has failed" if has_failed else "is in no wait: it is at work"
            yield f"{state}; its last event is {now - last:.3f} s old"
        pending = sorted(entry for source in self.pending_sources for entry in source())
        yield ""
        yield f"outstanding: {len(pending)}"
        for start, description in pending:
            yield f"  {now - start:10.3f} s  {description}"

    def _event_lines(self, now: float) -> Iterator[str]:
        yield ""
        yield f"last events: {len(self._events)}, seconds ago"
        for event_time, kind, facts in list(self._events):
            text = " ".join(map(_format_fact, facts))
            yield f"  {now - event_time:10.3f}  {kind:9} {text}".rstrip()


def dump_stacks_on(signal_number: int) -> None:
    """Print all stacks on this signal, until `FlightRecorder.dump_on_signal` replaces this."""
    # `dump_on_signal` uncovers this handler for a moment; the default would end the process.
    signal.signal(signal_number, signal.SIG_IGN)
    if sys.__stderr__ is not None:
        faulthandler.register(signal_number, sys.__stderr__, all_threads=True)


def print_error(message: str) -> None:
    """Print to stderr; never raise, so that a full disk hides no later message or action."""
    with suppress(OSError, ValueError):
        print(f"{message}\n", end="", file=sys.stderr, flush=True)  # one write, so one line


def flush_output() -> None:
    """Flush stdout and stderr; never raise."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def format_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as runs: "0-3,8"."""
    sorted_ranks = sorted(set(ranks))
    if not sorted_ranks:
        return ""
    starts = [i for i, (a, b) in enumerate(pairwise(sorted_ranks), 1) if b != a + 1]
    runs = [sorted_ranks[i:j] for i, j in pairwise([0, *starts, len(sorted_ranks)])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _format_fact(fact: object) -> str:
    return f"{fact:.6f} s" if isinstance(fact, float) else str(fact)
