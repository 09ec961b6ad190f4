"""Run work so that all ranks get its result, or all raise the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError

T = TypeVar("T")


def all_or_none(comm: Comm, work: Callable[[], T]) -> T:
    """Run `work` on all ranks and return its result. Collective over `comm`.

    `work` must not be collective itself.

    Raises
    ------
    DtrainError
        On all ranks, if `work` raises one on any rank: that of the lowest such rank.
    """
    error: DtrainError | None = None
    result: list[T] = []
    try:
        result.append(work())
    except DtrainError as caught:
        error = caught
    comm.raise_together(error)
    return result[0]


def broadcast_object(comm: Comm, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 and return its result on all ranks. Collective over `comm`.

    The result must be plain values of JSON; on all ranks, rank 0 included, a tuple is returned as a
    list. `work` must not be collective itself.

    Raises
    ------
    DtrainError
        On all ranks, if `work` raises one.
    """
    record = result = None
    if comm.rank == 0:
        try:
            result = work()
        except DtrainError as error:
            record = error.to_record()
    record, result = comm.allgather_object([record, result])[0]
    if record is not None:
        raise DtrainError.from_record(record)
    return result
