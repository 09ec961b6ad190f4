"""The run as a list of segments: the stretches between two drains of the pipe.

Invariant: segments are pure in the run file and the data's size; no clock and no signal moves
them, and none crosses an epoch's end.

::

    epoch 1            epoch 2            updates  0 1 2 3 4 | 5 6 7 8 9
    [0 1] [2 3] [4]    [5 6] [7 8] [9]    with step = 2 and 5 updates in an epoch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Updates ``first`` to ``last`` (excluded), counted from the start of the run.

    Attributes
    ----------
    epoch : int
        Counted from 0.
    offset : int
        The update of its epoch at which it starts.
    ends_epoch, ends_run : bool
        Whether it is the last of its epoch, or of the run.
    """

    epoch: int
    offset: int
    first: int
    last: int
    ends_epoch: bool
    ends_run: bool


@dataclass(frozen=True)
class Calendar:
    """How long a run is, and where it drains.

    Attributes
    ----------
    per_epoch : int
        Updates in one epoch.
    total : int
        Updates in the whole run.
    step : int
        Updates in one segment, the short last one of an epoch apart.
    """

    per_epoch: int
    total: int
    step: int

    @classmethod
    def of(
        cls, per_epoch: int, epochs: int | None, updates: int | None, segment: int, every: int
    ) -> Calendar:
        """Return the calendar of a run file: `every` is its checkpoint interval in updates."""
        total = updates if updates is not None else (epochs or 0) * per_epoch
        return cls(per_epoch, total, segment or every or per_epoch)

    @property
    def epochs(self) -> int:
        """Epochs begun when the run is done."""
        return -(-self.total // self.per_epoch)

    def segments(self, done: int = 0) -> Iterator[Segment]:
        """Yield the segments that follow once `done` updates are behind; `done` ends a segment."""
        while done < self.total:
            epoch, offset = divmod(done, self.per_epoch)
            ahead = min(self.step - offset % self.step, self.per_epoch - offset)
            last = min(done + ahead, self.total)
            full = last % self.per_epoch == 0
            yield Segment(epoch, offset, done, last, full, last == self.total)
            done = last
