"""Backend: moves bytes between the ranks of one group, and nothing else.

Invariant: all logic (dtypes, credits, order, means, counters) is in `Comm`, which works on any
backend; a backend knows only bytes. So `threads` and `single` cannot behave differently from `mpi`.

    Comm       tensors, channels, credits, means, counters, the one polled wait
      |
    Backend    isend  irecv  idle  split  abort
      |
      +-- mpi.MpiBackend           one process per rank
      +-- threads.ThreadBackend    n ranks in one process, one of them running at a time
      +-- single.SingleBackend     one rank
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from typing import NoReturn, final

import numpy as np
import numpy.typing as npt

from dtrain.errors import HangError

Bytes = npt.NDArray[np.uint8]
"""One-dimensional, contiguous."""


class CommTimeout(HangError):
    """A wait exceeds its time limit."""


@final
class Deadlock(CommTimeout):
    """No rank can continue; only backends inside one process detect it."""


class Request(ABC):
    """One transfer in flight; the caller keeps its memory alive until `test` returns true."""

    @abstractmethod
    def test(self) -> bool:
        """Return whether the transfer is complete; never block. May be called again after that."""


class PointToPointRequest(Request):
    """A send or a receive."""

    @abstractmethod
    def cancel(self) -> None:
        """Withdraw a receive that no send will match; its memory may then be freed."""


@final
class CombinedRequest(PointToPointRequest):
    """Several transfers, complete when all are."""

    def __init__(self, requests: Iterable[PointToPointRequest]) -> None:
        self._open_requests = list(requests)

    def test(self) -> bool:
        """Return whether all are complete."""
        self._open_requests = [request for request in self._open_requests if not request.test()]
        return not self._open_requests

    def cancel(self) -> None:
        """Withdraw all receives."""
        for request in self._open_requests:
            request.cancel()
        self._open_requests = []


def combine_requests(requests: Sequence[PointToPointRequest]) -> PointToPointRequest:
    """Return one request for all of them."""
    return requests[0] if len(requests) == 1 else CombinedRequest(requests)


class Backend(ABC):
    """The ranks of one group, for one of them.

    Messages of one (source, destination, tag) arrive in the order in which they were sent, and
    match receives in the order in which those were posted. Both ends state the same size.

    Attributes
    ----------
    rank, size : int
        Position in the group, and number of its ranks.
    hosts : tuple of str
        Host of each rank of the group, for people.
    nodes : tuple of hashable
        Node of each rank of the group: ranks of one node share memory. Two nodes may have the same
        host name, and containers on one node different ones.
    world_ranks : tuple of int
        Rank in the world of each rank of the group.
    library : str
        Name and version of the library that moves the bytes.
    """

    rank: int
    size: int
    hosts: tuple[str, ...]
    nodes: tuple[Hashable, ...]
    world_ranks: tuple[int, ...]
    library: str

    @abstractmethod
    def isend(self, data: Bytes, dest: int, tag: int) -> PointToPointRequest:
        """Start a send; it is complete only once the receive was posted, whatever the size."""

    @abstractmethod
    def irecv(self, data: Bytes, source: int, tag: int) -> PointToPointRequest:
        """Start to receive a message of exactly `data.size` bytes into `data`."""

    @abstractmethod
    def idle(self, turn: int, description: str) -> None:
        """Let other ranks run, after vain turn number `turn` (from 0) of a wait for `description`.

        Raises
        ------
        Deadlock
            No rank can continue.
        """

    @abstractmethod
    def split(self, color: int, key: int) -> Backend:
        """Return the backend of the ranks of this colour, by key, then rank.

        Collective over the group.
        """

    @abstractmethod
    def abort(self, code: int) -> NoReturn:
        """End all ranks of the job with this exit code."""
