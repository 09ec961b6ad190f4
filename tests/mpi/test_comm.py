"""The contract of Comm on MPI: `mpirun -n 1..4 python -m pytest --with-mpi tests/mpi`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dtrain.comm.comm import Comm
from tests.ranks.contract import CASES


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_contract(case: Callable[[Comm], None], comm: Comm) -> None:
    case(comm)


@pytest.mark.mpi
def test_sizes_must_agree(comm: Comm) -> None:
    comm.expect(comm.rank, 1, [((3,), torch.float32)])
    comm.isend(torch.ones(2), comm.rank, 1)
    with pytest.raises(RuntimeError, match=r"message of 8 bytes from rank .* receive of 12 bytes"):
        comm.recv(comm.rank, 1)
    comm.flush()


@pytest.mark.mpi(min_size=2)
def test_an_idle_rank_delays_but_does_not_hang(comm: Comm) -> None:
    """Means need all ranks; one that comes late is waited for outside MPI."""
    turns: list[int] = []
    comm.polls.append(lambda: turns.append(1))
    ready = comm.dup()
    tensor = torch.full((1 << 18,), float(comm.rank))
    if comm.rank == 0:
        comm.wait(lambda: len(turns) > 1000, "a thousand turns")
    ready.mean_([tensor])
    comm.polls.pop()
    assert tensor.eq((comm.size - 1) / 2).all()
