"""Telemetry: the flight recorder, what a rank did last and what it waits for now.

Invariant: recording formats nothing and never waits; an event is a tuple in a ring, and becomes
words only where somebody asks.

    note("action", F3.0, "update", 17)      note("send", ...)      note("waited", 0.02, ...)
                     |                            |                        |
                     v                            v                        v
    ring of the last 512   [ ... | 12.310 action | 12.311 send | 12.331 waited ]  -->  text()
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import final

LENGTH = 512
"""Events that are kept."""

Pending = tuple[float, str]
"""Since when (`time.perf_counter`), and what is outstanding."""

Place = FrameType | BaseException | None
"""What has a stack."""


@final
class Flight:
    """What one rank did last, and what it waits for.

    Parameters
    ----------
    name : str
        Who this is, in words.
    number : int
        World rank, for the name of the file.

    Attributes
    ----------
    waits : list of (float, str)
        The waits that this rank is in now, the innermost last.
    sources : list of callable
        Each tells what is outstanding: messages under way and receives that were posted.
    folder : Path or None
        Where `dump` writes; None: to stderr.
    """

    def __init__(self, name: str = "this process", number: int = 0) -> None:
        self.name, self.number = name, number
        self.waits: list[Pending] = []
        self.sources: list[Callable[[], Iterable[Pending]]] = []
        self.folder: Path | None = None
        self._events: deque[tuple[float, str, tuple[object, ...]]] = deque(maxlen=LENGTH)

    def note(self, kind: str, *facts: object) -> None:
        """Record an event; `facts` must not change later, since they are put into words later."""
        self._events.append((time.perf_counter(), kind, facts))

    def text(self, why: str = "asked", place: Place = None) -> str:
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
        head = f"{self.name}, process {os.getpid()}, at {stamp}: {why}"
        return "\n".join([head, "", *self._now(now), *self._past(now), *_stack(place), ""])

    def dump(self, why: str = "asked", place: Place = None) -> None:
        """Write `text` to `rank-NNNNN.txt` in `folder`, or to stderr; never raise.

        A file appears whole or not at all, and replaces the one before it.
        """
        try:
            text = self.text(why, place)
            if self.folder is None:
                print(text, file=sys.stderr, flush=True)
                return
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"rank-{self.number:05d}.txt"
            draft = path.with_suffix(".part")
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        except Exception as error:  # who looks at a run must not end it
            print(f"dtrain: no flight record of {self.name}: {error}", file=sys.stderr, flush=True)

    def _now(self, now: float) -> Iterator[str]:
        for since, what in self.waits:
            yield f"waits for {now - since:.3f} s for {what}"
        if not self.waits:
            last = self._events[-1][0] if self._events else now
            yield f"is in no wait: it is at work; its last event is {now - last:.3f} s old"
        pending = sorted(entry for source in self.sources for entry in source())
        yield ""
        yield f"outstanding: {len(pending)}"
        for since, what in pending:
            yield f"  {now - since:10.3f} s  {what}"

    def _past(self, now: float) -> Iterator[str]:
        yield ""
        yield f"last events: {len(self._events)}, seconds ago"
        for when, kind, facts in list(self._events):
            yield f"  {now - when:10.3f}  {kind:9} {' '.join(map(_word, facts))}".rstrip()


def _word(fact: object) -> str:
    return f"{fact:.6f} s" if isinstance(fact, float) else str(fact)


def _stack(place: Place) -> Iterator[str]:
    if place is None:
        return
    yield ""
    yield "stack"
    if isinstance(place, BaseException):
        lines = traceback.format_exception(place)
    else:
        lines = traceback.format_stack(place)
    yield from "".join(lines).splitlines()
