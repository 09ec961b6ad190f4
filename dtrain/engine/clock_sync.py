"""ClockSync: the offset of each rank's clock from the clock of rank 0.

Invariant: an offset is right within its `error`, whatever the network did.

::

    rank 0   start ----->                   offset = remote - (start + end) / 2
    rank r               remote             error = (end - start) / 2
    rank 0   end   <-----

Rank 0 probes each rank several times and keeps the fastest answer. Source: Cristian 1989,
"Probabilistic clock synchronization".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

from dtrain.comm.communicator import Comm

ROUND_TRIPS = 16
"""Probes of each rank."""


TAG = 0


MESSAGE_SPEC = (2,), torch.float64


class ClockOffset(NamedTuple):
    """The offset of a clock from rank 0's, in seconds.

    Attributes
    ----------
    measured_at : float
        When it was measured, by the clock itself.
    offset, error : float
        How far the clock is ahead of rank 0's, and the largest error of that.
    """

    measured_at: float
    offset: float
    error: float


@final
class ClockSync:
    """One rank's end of the measurement.

    Parameters
    ----------
    comm : Comm
        All ranks; nothing else may use it.
    now : callable
        Returns the time of this rank's clock, in seconds.
    """

    def __init__(self, comm: Comm, now: Callable[[], float] = time.perf_counter) -> None:
        self.comm = comm
        self.now = now

    def measure_offset(self) -> ClockOffset:
        """Return the offset of this rank's clock. Collective over all ranks.

        Its messages are not counted as traffic.
        """
        offset = error = 0.0
        with self.comm.without_counting():
            if self.comm.rank:
                offset, error = self._respond()
            else:
                for rank in range(1, self.comm.size):
                    self._probe(rank)
            self.comm.flush()
        return ClockOffset(self.now(), offset, error)

    def _probe(self, rank: int) -> None:
        """Measure the offset of a rank's clock, and send it the result."""
        self.comm.post_recv(rank, TAG, [MESSAGE_SPEC] * ROUND_TRIPS)
        measurements = []
        for _ in range(ROUND_TRIPS):
            start = self.now()
            self._send(rank, 0.0, 0.0)
            remote, _ = self._receive(rank)
            end = self.now()
            measurements.append(((end - start) / 2, remote - (start + end) / 2))
        error, offset = min(measurements)
        self._send(rank, offset, error)

    def _respond(self) -> tuple[float, float]:
        """Answer every probe with the time; return the offset and error that rank 0 measured."""
        self.comm.post_recv(0, TAG, [MESSAGE_SPEC] * (ROUND_TRIPS + 1))
        for _ in range(ROUND_TRIPS):
            self._receive(0)
            self._send(0, self.now(), 0.0)
        return self._receive(0)

    def _send(self, dest: int, *values: float) -> None:
        self.comm.isend(torch.tensor(values, dtype=torch.float64), dest, TAG)

    def _receive(self, source: int) -> tuple[float, float]:
        message = self.comm.recv(source, TAG)
        assert isinstance(message, Tensor)
        first, second = message.tolist()
        return first, second
