"""Warnings that come before a run can act on them: SIGUSR1 and SIGUSR2 are remembered.

Invariant: standard library only. From the first line of the program to its last, these signals end
no process that trains or starts ranks: by default they would.

    first line of the program     remembered
    a run trains                  the run saves and ends; also for those that came before
    between runs                  remembered
    last line of the program      ignored
"""

from __future__ import annotations

import signal
from types import FrameType

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


_remembered: list[int] = []


def remember_warnings() -> None:
    """Remember the warnings that come from now on. Main thread only."""
    for number in WARNINGS:
        signal.signal(number, remember)


def remember(number: int, frame: FrameType | None = None) -> None:
    """Remember a warning; a signal handler."""
    _remembered.append(number)


def take_remembered() -> list[int]:
    """Return the warnings that came, and forget them."""
    taken = list(dict.fromkeys(_remembered))
    _remembered.clear()
    return taken


def ignore_warnings() -> None:
    """Ignore the warnings that come from now on, also while Python ends. Main thread only."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
