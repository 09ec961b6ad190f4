"""Wires: bytes between the ranks of one group, and nothing else.

Invariant: all logic (dtypes, credits, order, means, counters) lives in `comm.Comm`, which stands on
any wire; a wire knows only bytes. So the doubles (`threads`, `single`) cannot drift from `mpi`.

    Comm      tensors, routes, credits, means, counters, the one polled wait
      |
    Wire      isend  irecv  idle  split  abort
      |
      +-- mpi.MpiWire          one process per rank
      +-- threads.ThreadWire   n ranks in one process, one of them running at a time
      +-- single.SingleWire    one rank
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NoReturn, final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
"""One-dimensional, contiguous."""


class CommTimeout(RuntimeError):
    """A wait that did not end: its deadline passed, or no rank can go on."""


class Request(ABC):
    """One transfer in flight. Whoever posts it keeps its memory alive until `test` is true."""

    @abstractmethod
    def test(self) -> bool:
        """Return whether the transfer is complete; never block; may be asked again after that."""


@final
class CombinedRequest(Request):
    """Several transfers, complete when all are."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._open_requests = list(requests)

    def test(self) -> bool:
        """Return whether all are complete."""
        self._open_requests = [request for request in self._open_requests if not request.test()]
        return not self._open_requests


def combine_requests(requests: Sequence[Request]) -> Request:
    """Return one request for all of them."""
    return requests[0] if len(requests) == 1 else CombinedRequest(requests)


class Backend(ABC):
    """The ranks of one group, seen by one of them.

    Messages of one (source, destination, tag) arrive in the order in which they were sent, and
    match receives in the order in which those were posted. Both ends state the same size.

    Attributes
    ----------
    rank, size : int
        Position in the group, and number of its ranks.
    hosts : tuple of str
        Host of each rank of the group.
    world : tuple of int
        What each rank of the group is in the world that it was split from.
    library : str
        What moves the bytes, in words, with its version.
    """

    rank: int
    size: int
    hosts: tuple[str, ...]
    world_ranks: tuple[int, ...]
    library: str

    @abstractmethod
    def isend(self, data: Bytes, dest: int, tag: int) -> Request:
        """Send; complete only once the receive was posted, whatever the size."""

    @abstractmethod
    def irecv(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive a message of exactly `data.size` bytes into `data`."""

    @abstractmethod
    def idle(self, turn: int, description: str) -> None:
        """Let others run; called after the `turn`-th vain look (from 0) of a wait for `what`."""

    @abstractmethod
    def split(self, color: int, key: int) -> Backend:
        """Return the wire of the ranks with my colour, by key, then rank. Collective."""

    @abstractmethod
    def abort(self, code: int) -> NoReturn:
        """End all ranks of the job with this exit code."""
