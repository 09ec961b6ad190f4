"""Clocks: how far each rank's clock is ahead of rank 0's.

Invariant: an answer is right to its `error`, whatever the network did.

::

    rank 0   start --ask-->                 ahead = told - (start + end) / 2
    rank r                 told             error = (end - start) / 2
    rank 0   end   <-------

Rank 0 asks each rank some times; the answer that was fastest counts. Source: Cristian 1989,
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


TAG = 0


MESSAGE_SPEC = (2,), torch.float64


class ClockOffset(NamedTuple):
    """How far a clock is ahead of rank 0's, in seconds.

    Attributes
    ----------
    at : float
        When it was asked, by itself.
    ahead, error : float
        By how much, and how wrong that may be.
    """

    measured_at: float
    offset: float
    error: float


@final
class ClockSync:
    """One rank's part of the asking.

    Parameters
    ----------
    line : Comm
        All ranks; nothing else may use it.
    now : callable
        Returns the time of this rank's clock, in seconds.
    """

    def __init__(self, comm: Comm, now: Callable[[], float] = time.perf_counter) -> None:
        self.comm, self.now = comm, now

    def measure_offset(self) -> ClockOffset:
        """Return how far mine is ahead. Collective; not counted as traffic."""
        with self.comm.without_counting():
            if self.comm.rank:
                found = self._respond()
            else:
                for rank in range(1, self.comm.size):
                    self._probe(rank)
                found = 0.0, 0.0
            self.comm.flush()
        return ClockOffset(self.now(), *found)

    def _probe(self, rank: int) -> None:
        """Ask a rank, and tell it what was found."""
        self.comm.post_recv(rank, TAG, [MESSAGE_SPEC] * ROUND_TRIPS)
        answers = []
        for _ in range(ROUND_TRIPS):
            start = self.now()
            self._send(rank, 0.0, 0.0)
            told, _ = self._receive(rank)
            end = self.now()
            answers.append(((end - start) / 2, told - (start + end) / 2))
        error, ahead = min(answers)
        self._send(rank, ahead, error)

    def _respond(self) -> tuple[float, float]:
        """Tell the time whenever it is asked for; return what rank 0 found."""
        self.comm.post_recv(0, TAG, [MESSAGE_SPEC] * (ROUND_TRIPS + 1))
        for _ in range(ROUND_TRIPS):
            self._receive(0)
            self._send(0, self.now(), 0.0)
        return self._receive(0)

    def _send(self, to: int, *values: float) -> None:
        self.comm.isend(torch.tensor(values, dtype=torch.float64), to, TAG)

    def _receive(self, source: int) -> tuple[float, float]:
        message = self.comm.recv(source, TAG)
        assert isinstance(message, Tensor)
        one, two = message.tolist()
        return one, two
