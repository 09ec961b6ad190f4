"""The contract of Comm on MPI: `mpirun -n 4 python -m pytest --with-mpi tests/mpi`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from dtrain.comm.communicator import Comm
from tests.need import lack
from tests.ranks.contract import CASES, observing, raises_naming


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_contract(case: Callable[[Comm], None], group: Comm) -> None:
    case(group)


@pytest.mark.mpi
def test_sizes_must_agree(comm: Comm) -> None:
    comm.post_recv(comm.rank, 1, [((3,), torch.float32)])
    comm.isend(torch.ones(2), comm.rank, 1)
    with raises_naming(RuntimeError, "8 bytes", "12 bytes"):
        comm.recv(comm.rank, 1)
    comm.flush()


@pytest.mark.mpi(min_size=2)
def test_an_idle_rank_delays_but_does_not_hang(comm: Comm) -> None:
    """Means need all ranks; the wait for a late one is outside MPI."""
    turns: list[int] = []
    ready = comm.dup()
    tensor = torch.full((1 << 18,), float(comm.rank))
    with observing(comm, lambda: turns.append(1)):
        if comm.rank == 0:
            comm.wait(lambda: len(turns) > 1000, "a thousand turns")
        ready.mean_([tensor])
    assert tensor.eq((comm.size - 1) / 2).all()


@pytest.mark.mpi(min_size=2)
def test_progress_alone_receives_a_large_message(comm: Comm) -> None:
    """A rank that computes between calls of `progress`, and never waits, receives from others."""
    with TemporaryDirectory() as folder:
        sent = Path(comm.allgather_object(folder)[0]) / "sent"
        if comm.rank == 0:
            comm.isend(torch.full((1 << 21,), 3.0), 1, 1)
            comm.flush()
            sent.touch()
        if comm.rank == 1:
            comm.post_recv(0, 1, [((1 << 21,), torch.float32)])
            limit = time.monotonic() + 10
            while not sent.exists():
                comm.progress()
                assert time.monotonic() < limit, "the message was not received"
            assert comm.recv(0, 1).eq(3).all()
        comm.allgather_object(None)


@pytest.mark.mpi(min_size=2)
def test_a_message_above_two_gib(comm: Comm) -> None:
    """Counts of MPI end at 2^31 - 1; a message does not."""
    count = (1 << 31) + 12_345
    available = min(comm.allgather_object(_available_bytes()))
    if available < 6 * count:
        lack("memory", f"{available >> 20} MiB are available, {6 * count >> 20} needed")
    if comm.rank == 0:
        sent = torch.empty(count, dtype=torch.uint8)  # a page in 256 is touched: that is fast
        sent[:: 1 << 20] = torch.arange(2049, dtype=torch.int64).to(torch.uint8)
        sent[-3:] = torch.tensor([7, 8, 9])
        comm.isend((sent, torch.tensor(5)), 1, 1)
        comm.flush()
    elif comm.rank == 1:
        comm.post_recv(0, 1, [(((count,), torch.uint8), ((), torch.int64))])
        received, number = comm.recv(0, 1)
        assert number.item() == 5
        pages = torch.arange(2048, dtype=torch.int64).to(torch.uint8)
        assert received[:: 1 << 20][:-1].equal(pages)
        assert received[-3:].tolist() == [7, 8, 9]


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    rows = dict(row.split(":") for row in meminfo.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024
