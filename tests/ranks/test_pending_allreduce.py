"""All-reduces that are pending when a rank raises or a group closes: no leak, no hang."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dtrain.comm.allreduce import PIECE_BYTES
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm

WORDS = 3 * PIECE_BYTES // 4
"""Of three pieces."""


def lent(comm: Comm) -> int:
    """Return how many buffers of the family's scratch memory nobody holds."""
    return sum(map(len, comm.context.buffer_pool._free.values()))


def test_scratch_is_given_back_when_a_mean_lands() -> None:
    def work(comm: Comm) -> tuple[int, int]:
        comm.imean_([torch.ones(WORDS)]).wait()
        before = lent(comm)
        handles = [comm.imean_([torch.ones(WORDS)]) for _ in range(3)]
        for handle in handles:
            handle.wait()
        comm.allgather_object(None)
        return before, lent(comm)

    for before, after in run_ranks(3, work, hosts=["a", "b", "b"]):
        assert 0 < before <= after <= 3 * before


def test_a_rank_that_raises_ends_all_and_the_tensors_go() -> None:
    """What a rank was about to average, and the memory lent for that, are let go by the error."""
    watched: list[weakref.ref[torch.Tensor]] = []

    def work(comm: Comm) -> None:
        tensor = torch.ones(WORDS)
        watched.append(weakref.ref(tensor))
        handle = comm.imean_([tensor])
        comm.allgather_object(None)
        if comm.rank == 1:
            raise ZeroDivisionError
        handle.wait()
        comm.allgather_object(None)

    with pytest.raises(ZeroDivisionError) as caught:
        run_ranks(3, work)
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    assert [tensor() for tensor in watched] == [None] * 3


def test_a_closed_group_names_its_mean_which_can_still_land() -> None:
    def work(comm: Comm) -> float:
        group = comm.dup("errands")
        tensor = torch.full((WORDS,), float(comm.rank))
        if comm.rank == 0:
            handle = group.imean_([tensor])
            with pytest.raises(
                RuntimeError, match=r"errands is closed with 1 in flight: a mean of"
            ):
                group.close()
        comm.allgather_object(None)
        if comm.rank:
            handle = group.imean_([tensor])
        handle.wait()
        group.close()
        comm.allgather_object(None)
        return float(tensor.max())

    assert run_ranks(2, work) == [0.5, 0.5]
