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

from dtrain.comm.comm import Comm

TIMES = 16
TAG = 0
SPEC = (2,), torch.float64


class Ahead(NamedTuple):
    """How far a clock is ahead of rank 0's, in seconds.

    Attributes
    ----------
    at : float
        When it was asked, by itself.
    ahead, error : float
        By how much, and how wrong that may be.
    """

    at: float
    ahead: float
    error: float


@final
class Clocks:
    """One rank's part of the asking.

    Parameters
    ----------
    line : Comm
        All ranks; nothing else may use it.
    now : callable
        Returns the time of this rank's clock, in seconds.
    """

    def __init__(self, line: Comm, now: Callable[[], float] = time.perf_counter) -> None:
        self.line, self.now = line, now

    def ask(self) -> Ahead:
        """Return how far mine is ahead. Collective; not counted as traffic."""
        with self.line.uncounted():
            if self.line.rank:
                found = self._answer()
            else:
                for rank in range(1, self.line.size):
                    self._question(rank)
                found = 0.0, 0.0
            self.line.flush()
        return Ahead(self.now(), *found)

    def _question(self, rank: int) -> None:
        """Ask a rank, and tell it what was found."""
        self.line.expect(rank, TAG, [SPEC] * TIMES)
        answers = []
        for _ in range(TIMES):
            start = self.now()
            self._send(rank, 0.0, 0.0)
            told, _ = self._told(rank)
            end = self.now()
            answers.append(((end - start) / 2, told - (start + end) / 2))
        error, ahead = min(answers)
        self._send(rank, ahead, error)

    def _answer(self) -> tuple[float, float]:
        """Tell the time whenever it is asked for; return what rank 0 found."""
        self.line.expect(0, TAG, [SPEC] * (TIMES + 1))
        for _ in range(TIMES):
            self._told(0)
            self._send(0, self.now(), 0.0)
        return self._told(0)

    def _send(self, to: int, *values: float) -> None:
        self.line.isend(torch.tensor(values, dtype=torch.float64), to, TAG)

    def _told(self, source: int) -> tuple[float, float]:
        message = self.line.recv(source, TAG)
        assert isinstance(message, Tensor)
        one, two = message.tolist()
        return one, two
