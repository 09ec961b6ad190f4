"""Limits: how long a rank may be without an event, by section of the run.

Invariant: a limit is never below the one of the run file, and grows with the longest pause that
this run has had in the section.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

FACTOR = 10.0
"""A limit is at least this many times the longest pause so far."""


FIRST_UPDATE, UPDATE = "first-update", "update"
"""Sections: until a rank has ended its first update, and after it."""


MIN_TICK_S, MAX_TICK_S = 0.05, 5.0
"""Shortest and longest time between two looks at a rank."""


@final
class Limits:
    """The limits of one rank.

    Parameters
    ----------
    minimums : mapping of str to float
        Seconds by section; 0: no limit.
    """

    def __init__(self, minimums: Mapping[str, float]) -> None:
        self._minimums = {section: s for section, s in minimums.items() if s > 0}
        self._longest: dict[str, float] = {}

    @property
    def enabled(self) -> bool:
        """Whether any section has a limit."""
        return bool(self._minimums)

    @property
    def tick_s(self) -> float:
        """Seconds between two looks at a rank."""
        shortest = min(self._minimums.values(), default=math.inf)
        return min(max(shortest / 20, MIN_TICK_S), MAX_TICK_S)

    def note_pause(self, section: str | None, pause_s: float) -> None:
        """Add a pause between two events that is over."""
        if section in self._minimums:
            self._longest[section] = max(self._longest.get(section, 0.0), pause_s)

    def of(self, section: str | None) -> float:
        """Return the limit of a section in seconds; infinite: there is none."""
        if section not in self._minimums:
            return math.inf
        return max(self._minimums[section], FACTOR * self._longest.get(section, 0.0))


@final
class Pulse:
    """How long a rank has been without an event.

    A process that was stopped, as by a suspended job, begins anew: its own time does not count.

    Parameters
    ----------
    limits : Limits
        Receives the pauses that are over.
    interval_s : float
        Seconds between two samples.
    """

    def __init__(self, limits: Limits, interval_s: float) -> None:
        self._limits = limits
        self._late_s = 2 * interval_s + 1.0
        self._sampled_s: float | None = None
        self._begin_s = 0.0
        self._event_s = 0.0
        self._section: str | None = None
        self._pause_s = 0.0

    def sample(self, now: float, event_s: float, section: str | None) -> bool:
        """Take the time of the last event; return whether this process was stopped meanwhile.

        All times are those of `time.perf_counter`.
        """
        was_stopped = self._sampled_s is not None and now - self._sampled_s > self._late_s
        if was_stopped or self._sampled_s is None:
            self._begin_s, self._section = now, section
        self._sampled_s = now
        if event_s != self._event_s:
            self._limits.note_pause(self._section, self._pause_s)
            self._event_s, self._section = event_s, section
        self._pause_s = self.still_s(now)
        return was_stopped

    def still_s(self, now: float) -> float:
        """Return the seconds without an event, as far as this process has run."""
        return now - max(self._event_s, self._begin_s)

    def is_current(self, now: float) -> bool:
        """Return whether this process was sampled a moment ago, so that it was not stopped."""
        return self._sampled_s is not None and now - self._sampled_s <= self._late_s
