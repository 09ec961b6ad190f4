"""RunClock: asks for a checkpoint every so many minutes, and for the end before the job's limit.

Invariant: it decides nothing but when a request is made; all ranks then agree on the update. Rank 0
alone has a clock. Its times are measured, never estimated from the plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import final

from dtrain.comm.early_end import EarlyEnd
from dtrain.planning.formatting import pluralise
from dtrain.planning.plan import Plan
from dtrain.session.job_limit import JobLimit
from dtrain.session.requests import SAVE, TIME_LIMIT, reason

MARGIN = 2.0
"""Factor of the measured times of a checkpoint and of training to the next update."""


LEAST_LEAD_S = 10.0
"""Seconds before the limit at which a run stops at the latest."""


FIRST_SAVE_S, FIRST_SAVE_SHARE = 30.0, 0.05
"""Seconds that a checkpoint counts before one was measured, and their largest share of the time
that the job has left at the start."""


DECAY = 0.95
"""A shorter update lowers the time that counts by this factor at most."""


SETTLED_UPDATES = 3
"""Updates that are measured before a note says that the time does not suffice."""


@final
class RunClock:
    """The clock of rank 0.

    Parameters
    ----------
    early_end : EarlyEnd
        Receives the requests.
    say : callable
        Prints a line.
    starts_at : int
        Updates done before.
    limit : JobLimit, optional
        When the job ends.
    """

    def __init__(
        self,
        early_end: EarlyEnd,
        plan: Plan,
        say: Callable[[str], None],
        limit: JobLimit | None = None,
        starts_at: int = 0,
    ) -> None:
        self._early_end = early_end
        self._say = say
        self._limit = limit
        self._length = plan.training_length
        self._interval_s = 60.0 * plan.run.checkpoint.every_minutes or math.inf
        self._next_save = time.monotonic() + self._interval_s
        self._first_save_s: float | None = None
        self._save_s, self._eval_s, self._update_s = 0.0, 0.0, 0.0
        self._last_update: tuple[int, float] = starts_at - 1, time.monotonic()
        self._measured = 0
        self._said_request = self._said_limit = False

    def check(self) -> None:
        """Request what is due; called often, so it reads the time and little else."""
        now = time.monotonic()
        if now >= self._next_save:
            self._next_save = now + self._interval_s
            self._early_end.passing_request = SAVE
        if self._limit is None or self._limit.end == math.inf:
            return
        if self._first_save_s is None:
            left_s = max(self._limit.end - now, 0.0)
            self._save_s = self._first_save_s = min(FIRST_SAVE_S, FIRST_SAVE_SHARE * left_s)
        if now >= self._limit.end - self.lead_s() and self._early_end.requested < TIME_LIMIT:
            self._early_end.requested = TIME_LIMIT
            if not self._measured and not self._said_limit:
                self._said_limit = True
                self._say(
                    f"the job ends in {clock_text(self._limit.end - now)}, too soon to train: give "
                    "it more time"
                )

    def lead_s(self) -> float:
        """Return the seconds before the job's limit at which the run has to stop."""
        lead_s = MARGIN * (self._save_s + self._stretch() * self._update_s) + self._eval_s
        return max(lead_s, LEAST_LEAD_S)

    def _stretch(self) -> int:
        """Return the updates to the next one after which the run can stop, at most."""
        return 1 if self._early_end.in_segments else self._length.longest_segment

    def note_update(self, update: int) -> None:
        """Measure an update that has just ended."""
        now = time.monotonic()
        last, then = self._last_update
        self._last_update = update, now
        if update == last + 1 and self._measured:
            self._update_s = max(now - then, DECAY * self._update_s)
        self._measured += 1
        if not self._said_limit and self._measured > SETTLED_UPDATES:
            self._say_if_too_long(now)
        if self._early_end.requested and not self._said_request:
            self._said_request = True
            self._say_where_it_stops(update)

    def note_save(self, save_s: float | None) -> None:
        """Record the time of a checkpoint; the next one by the clock is counted from now.

        Parameters
        ----------
        save_s : float or None
            None: it is being written, and none has been measured yet.
        """
        if save_s is not None:
            self._save_s = self._first_save_s = save_s
        self._restart(time.monotonic())
        self._next_save = time.monotonic() + self._interval_s

    def note_evaluation(self, eval_s: float) -> None:
        """Record the time of an evaluation."""
        self._eval_s = max(eval_s, self._eval_s)
        self._restart(time.monotonic())

    def _restart(self, now: float) -> None:
        """Count the next update from now."""
        self._last_update = self._last_update[0], now

    def _say_if_too_long(self, now: float) -> None:
        """Say once that the run cannot reach a checkpoint within the limit of the job."""
        self._said_limit = True
        if self._limit is None:
            return
        stretch_s, left_s = self._stretch() * self._update_s, self._limit.end - now
        if stretch_s + self._save_s <= left_s:
            return
        updates = pluralise(self._stretch(), "update")
        cure = (
            "set [checkpoint] every = N for shorter segments"
            if self._stretch() > 1
            else "give the job more time, or the run smaller updates"
        )
        self._say(
            f"the job ends in {clock_text(left_s)}, but {updates} to the next checkpoint take "
            f"about {clock_text(stretch_s)}: nothing would be saved; {cure}"
        )

    def _say_where_it_stops(self, update: int) -> None:
        """Say at which update a stopped run saves, if that is not the next update."""
        if self._early_end.in_segments:
            self._say(f"{reason(self._early_end.requested)}: saves and ends at the next update")
            return
        stop = self._length.segment_end(update)
        left_s = (stop - update - 1) * self._update_s
        self._say(
            f"{reason(self._early_end.requested)}: saves and ends after update {stop:,}, where "
            f"the segment ends, in about {clock_text(left_s)} (shorter segments: [checkpoint] "
            "every)"
        )


def clock_text(seconds: float) -> str:
    """Return a duration as "1:02:03".

    >>> clock_text(3723.4), clock_text(-1)
    ('1:02:03', '0:00:00')
    """
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
