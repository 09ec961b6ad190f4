"""BannerFilter: removes from a launcher's stderr its banners about ranks that ended.

Invariant: only a whole block between two rules that begins with a known sentence is dropped. Every
other byte passes at once, also a progress bar that is redrawn in place.

    ----------------------------------------------  <- a rule: kept back until the next line is read
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
"""First words of the banners that repeat the message of a rank. Open MPI's banner about a rank that
a signal killed is not among them: no rank prints that."""


KILLED_STARTS = (b"prterun noticed that process rank", b"mpirun noticed that process rank")
"""First words of the banner about a rank that a signal has ended, which is not dropped."""


@final
class BannerFilter:
    """Filters a stream that is read in pieces.

    Attributes
    ----------
    banners : bytes
        The lines that were dropped.
    names_killed_rank : bool
        Whether a banner named a rank that a signal has ended.
    """

    def __init__(self) -> None:
        self.banners = b""
        self.names_killed_rank = False
        self._buffer = b""
        self._at_line_start = True  # whether the next byte begins a line
        self._in_banner = False

    def feed(self, data: bytes) -> bytes:
        """Add a piece of the stream; return what of the filtered stream is certain so far."""
        self._buffer += data
        output = b""
        while self._buffer:
            piece = self._drop_line() if self._in_banner else self._pass_line()
            if piece is None:
                break
            output += piece
        return output

    def close(self) -> bytes:
        """Return the rest of the filtered stream, at the end of the stream."""
        rest = b"" if self._in_banner else self._buffer
        self._buffer = b""
        return rest

    def _drop_line(self) -> bytes | None:
        """Drop one line of a banner; None: wait for its end."""
        line, end, rest = self._buffer.partition(b"\n")
        if not end:
            return None
        self._in_banner = not RULE_LINE.fullmatch(line + end)
        self.banners += line + end
        self._buffer = rest
        return b""

    def _pass_line(self) -> bytes | None:
        """Return the next line, or its bytes so far; None: wait for more."""
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
        """Drop or return a rule, depending on the line after it; None: wait for more of it."""
        after = self._buffer[start:]
        if after.startswith(BANNER_STARTS):
            self._in_banner, self._buffer = True, after
            return b""
        if any(start_of_banner.startswith(after) for start_of_banner in BANNER_STARTS):
            return None
        if any(start_of_banner.startswith(after) for start_of_banner in KILLED_STARTS):
            return None
        self.names_killed_rank |= after.startswith(KILLED_STARTS)
        rule, self._buffer = self._buffer[:start], after
        return rule
