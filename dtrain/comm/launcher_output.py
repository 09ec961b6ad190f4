"""Banners: what a launcher prints about ranks that ended, kept off the screen.

Invariant: only whole blocks between two rules that begin with a known sentence are dropped; every
other byte passes at once, a bar that is redrawn in place included.

    ----------------------------------------------  <- a rule: held until the next line is known
    prterun detected that one or more processes     <- known: dropped up to the next rule
    ...
    ----------------------------------------------
"""

from __future__ import annotations

import re
from typing import final

RULE_LINE = re.compile(rb"-{60,}\r?\n")


BANNER_STARTS = (
    b"MPI_ABORT was invoked on rank",
    b"prterun detected that one or more processes exited with non-zero status",
    b"prterun has exited due to process rank",
    b"mpirun detected that one or more processes exited with non-zero status",
    b"mpirun has exited due to process rank",
    b"mpiexec has exited due to process rank",
    b"Primary job  terminated normally",
)
"""First words of the banners that repeat what a rank has said itself. What Open MPI says about a
rank that a signal killed is not among them: nobody else says it."""


@final
class BannerFilter:
    """Takes a stream piece by piece and returns what shall be seen of it."""

    def __init__(self) -> None:
        self._buffer = b""
        self._at_line_start = True  # whether what comes next begins a line
        self._in_banner = False

    def feed(self, data: bytes) -> bytes:
        """Return what can be shown so far."""
        self._buffer += data
        shown = b""
        while self._buffer:
            taken = self._drop_line() if self._in_banner else self._pass_line()
            if taken is None:
                break
            shown += taken
        return shown

    def close(self) -> bytes:
        """Return the rest at the end of the stream."""
        rest = b"" if self._in_banner else self._buffer
        self._buffer = b""
        return rest

    def _drop_line(self) -> bytes | None:
        """Drop one line of a banner; None: wait for its end."""
        line, end, rest = self._buffer.partition(b"\n")
        if not end:
            return None
        self._in_banner = not RULE_LINE.fullmatch(line + end)
        self._buffer = rest
        return b""

    def _pass_line(self) -> bytes | None:
        """Return the next line, or what there is of it; None: wait for more."""
        if self._at_line_start:
            self._buffer = self._buffer.lstrip(b"\0")  # Open MPI ends its last banner with one
            if not self._buffer.strip(b"-\r"):
                return None  # may become a rule
            if rule := RULE_LINE.match(self._buffer):
                return self._classify_rule(rule.end())
        line, end, self._buffer = self._buffer.partition(b"\n")
        self._at_line_start = bool(end)
        return line + end

    def _classify_rule(self, start: int) -> bytes | None:
        """Decide about a rule by the line after it; None: too little of that line is known."""
        after = self._buffer[start:]
        if after.startswith(BANNER_STARTS):
            self._in_banner, self._buffer = True, after
            return b""
        if any(known.startswith(after) for known in BANNER_STARTS):
            return None
        rule, self._buffer = self._buffer[:start], after
        return rule
