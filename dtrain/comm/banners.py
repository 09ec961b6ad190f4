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

RULE = re.compile(rb"-{60,}\r?\n")

KNOWN = (
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
class Sieve:
    """Takes a stream piece by piece and returns what shall be seen of it."""

    def __init__(self) -> None:
        self._held = b""
        self._fresh = True  # whether what comes next begins a line
        self._dropping = False

    def feed(self, data: bytes) -> bytes:
        """Return what can be shown so far."""
        self._held += data
        shown = b""
        while self._held:
            taken = self._drop() if self._dropping else self._pass()
            if taken is None:
                break
            shown += taken
        return shown

    def close(self) -> bytes:
        """Return the rest at the end of the stream."""
        rest = b"" if self._dropping else self._held
        self._held = b""
        return rest

    def _drop(self) -> bytes | None:
        """Drop one line of a banner; None: wait for its end."""
        line, end, rest = self._held.partition(b"\n")
        if not end:
            return None
        self._dropping = not RULE.fullmatch(line + end)
        self._held = rest
        return b""

    def _pass(self) -> bytes | None:
        """Return the next line, or what there is of it; None: wait for more."""
        if self._fresh:
            self._held = self._held.lstrip(b"\0")  # Open MPI ends its last banner with one
            if not self._held.strip(b"-\r"):
                return None  # may become a rule
            if rule := RULE.match(self._held):
                return self._judge(rule.end())
        line, end, self._held = self._held.partition(b"\n")
        self._fresh = bool(end)
        return line + end

    def _judge(self, start: int) -> bytes | None:
        """Decide about a rule by the line after it; None: too little of that line is known."""
        after = self._held[start:]
        if after.startswith(KNOWN):
            self._dropping, self._held = True, after
            return b""
        if any(known.startswith(after) for known in KNOWN):
            return None
        rule, self._held = self._held[:start], after
        return rule
