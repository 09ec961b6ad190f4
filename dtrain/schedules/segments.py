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
    start: int
    stop: int
    ends_epoch: bool
    ends_run: bool


@dataclass(frozen=True)
class TrainingLength:
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

    updates_per_epoch: int
    total_updates: int
    updates_per_segment: int

    @classmethod
    def from_settings(
        cls,
        updates_per_epoch: int,
        epochs: int | None,
        updates: int | None,
        updates_per_segment: int,
        checkpoint_interval: int,
    ) -> TrainingLength:
        """Return the calendar of a run file: `every` is its checkpoint interval in updates."""
        total = updates if updates is not None else (epochs or 0) * updates_per_epoch
        return cls(
            updates_per_epoch,
            total,
            updates_per_segment or checkpoint_interval or updates_per_epoch,
        )

    @property
    def epochs(self) -> int:
        """Epochs begun when the run is done."""
        return -(-self.total_updates // self.updates_per_epoch)

    def segments(self, completed_updates: int = 0) -> Iterator[Segment]:
        """Yield the segments that follow once `done` updates are behind; `done` ends a segment."""
        while completed_updates < self.total_updates:
            epoch, offset = divmod(completed_updates, self.updates_per_epoch)
            ahead = min(
                self.updates_per_segment - offset % self.updates_per_segment,
                self.updates_per_epoch - offset,
            )
            last = min(completed_updates + ahead, self.total_updates)
            full = last % self.updates_per_epoch == 0
            yield Segment(epoch, offset, completed_updates, last, full, last == self.total_updates)
            completed_updates = last
