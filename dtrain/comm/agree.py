"""Collective agreement: an error on one rank is raised on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError

T = TypeVar("T")


def all_or_none(comm: Comm, work: Callable[[], T]) -> T:
    """Return what `work` returns, unless it raises a `DtrainError` on any rank: then all raise it.

    Collective over `comm`; `work` itself must not be.
    """
    failure: DtrainError | None = None
    result: list[T] = []
    try:
        result.append(work())
    except DtrainError as error:
        failure = error
    comm.raise_together(failure)
    return result[0]


def broadcast_object(comm: Comm, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on all ranks; an error there is raised on all.

    Collective over `comm`; `work` itself must not be. JSON must be able to hold the result.
    """
    result = all_or_none(comm, lambda: None if comm.rank else work())
    broadcast: T = comm.allgather_object(result)[0]
    return broadcast
