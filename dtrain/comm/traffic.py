"""Traffic: payload bytes handed to sends, inside nodes and between them.

Invariant: counted is what leaves a rank in `isend`, `mean_` and `broadcast_`; neither control data
(JSON, the weights of a mean) nor what is started while the count is paused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final


@final
@dataclass
class Traffic:
    """Payload bytes sent by this rank, over all groups that it belongs to.

    Attributes
    ----------
    bytes_intra, bytes_inter : int
        To ranks of the same host (itself included), to ranks of other hosts.
    on : bool
        Whether what is started now is counted.
    held_bytes, peak_held_bytes : int
        Buffers of messages under way and of posted receives, now and at most.
    """

    bytes_intra: int = 0
    bytes_inter: int = 0
    on: bool = True
    held_bytes: int = 0
    peak_held_bytes: int = 0

    def count(self, size_bytes: int, near: bool) -> None:
        """Add one message."""
        if near:
            self.bytes_intra += size_bytes
        else:
            self.bytes_inter += size_bytes

    def hold(self, size_bytes: int) -> None:
        """Add a buffer to those that messages occupy; a negative size gives it back."""
        self.held_bytes += size_bytes
        self.peak_held_bytes = max(self.peak_held_bytes, self.held_bytes)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing that is started inside."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before
