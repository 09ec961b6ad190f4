"""Collective agreement: an error on one rank is raised on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError

T = TypeVar("T")


def all_or_none(comm: Comm, work: Callable[[], T]) -> T:
    """Return what `work` returns, unless it refuses on any rank: then all ranks refuse.

    Collective; `work` itself must not be.
    """
    refusal: DtrainError | None = None
    result: list[T] = []
    try:
        result.append(work())
    except DtrainError as error:
        refusal = error
    comm.raise_together(refusal)
    return result[0]
