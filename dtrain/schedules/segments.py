"""Segments: the updates of a run between two flushes of the pipeline.

Invariant: segments depend on the run file and the size of the data alone, not on time or signals;
no segment crosses the end of an epoch. A run that was stopped inside a segment continues with the
rest of it.

::

    epoch 0            epoch 1            updates  0 1 2 3 4 | 5 6 7 8 9
    [0 1] [2 3] [4]    [5 6] [7 8] [9]    2 updates per segment, 5 updates per epoch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Updates `start` to `stop` (excluded), counted from the start of the run.

    Attributes
    ----------
    epoch : int
        Counted from 0.
    offset : int
        Number of its first update, counted from the start of the epoch.
    ends_epoch, ends_run : bool
        Whether it is the last segment of its epoch, or of the run.
    """

    epoch: int
    offset: int
    start: int
    stop: int
    ends_epoch: bool
    ends_run: bool


@dataclass(frozen=True)
class TrainingLength:
    """Length of a run and of its epochs and segments, in updates.

    Attributes
    ----------
    updates_per_epoch, total_updates : int
        Updates in one epoch and in the whole run.
    updates_per_segment : int
        Updates in one segment; the last segment of an epoch may be shorter.
    evaluation_interval : int
        Updates between two evaluations, counted from the start of the run; a segment ends before
        each. 0: evaluations end no segment.
    """

    updates_per_epoch: int
    total_updates: int
    updates_per_segment: int
    evaluation_interval: int = 0

    @classmethod
    def from_settings(
        cls,
        updates_per_epoch: int,
        epochs: int | None,
        updates: int | None,
        updates_per_segment: int,
        checkpoint_interval: int,
        evaluation_interval: int = 0,
    ) -> TrainingLength:
        """Return the length that the keys of a run file set.

        Parameters
        ----------
        updates_per_epoch : int
            Follows from the size of the data and of the batch.
        epochs, updates : int or None
            Length of the run; `updates` takes precedence.
        updates_per_segment, checkpoint_interval : int
            Updates between flushes and between checkpoints. The first one that is not 0 sets the
            segments; both 0: one segment per epoch.
        evaluation_interval : int
            As in the class.
        """
        total = updates if updates is not None else (epochs or 0) * updates_per_epoch
        return cls(
            updates_per_epoch,
            total,
            updates_per_segment or checkpoint_interval or updates_per_epoch,
            evaluation_interval,
        )

    @property
    def epochs(self) -> int:
        """Epochs that the run begins."""
        return -(-self.total_updates // self.updates_per_epoch)

    def segments(self, completed_updates: int = 0) -> Iterator[Segment]:
        """Yield the segments after `completed_updates`; inside a segment, the rest of it first."""
        start = completed_updates
        while start < self.total_updates:
            epoch, offset = divmod(start, self.updates_per_epoch)
            length = min(
                self.updates_per_segment - offset % self.updates_per_segment,
                self.updates_per_epoch - offset,
            )
            if self.evaluation_interval:
                length = min(length, self.evaluation_interval - start % self.evaluation_interval)
            stop = min(start + length, self.total_updates)
            yield Segment(
                epoch,
                offset,
                start,
                stop,
                ends_epoch=stop % self.updates_per_epoch == 0,
                ends_run=stop == self.total_updates,
            )
            start = stop

    @property
    def longest_segment(self) -> int:
        """The most updates of a segment."""
        longest = min(self.updates_per_segment, self.updates_per_epoch)
        return min(longest, self.evaluation_interval or longest)

    def segment_end(self, update: int) -> int:
        """Return the end of the segment that holds an update, counted from 0."""
        return next(self.segments(update)).stop

    def update_before(self, completed_updates: int) -> Segment:
        """Return the last of the completed updates, as a segment of its own."""
        start = completed_updates - 1
        epoch, offset = divmod(start, self.updates_per_epoch)
        return Segment(
            epoch,
            offset,
            start,
            completed_updates,
            ends_epoch=completed_updates % self.updates_per_epoch == 0,
            ends_run=completed_updates == self.total_updates,
        )
