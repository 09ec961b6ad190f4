"""MPI: the wire between processes, and the only importer of mpi4py.

Invariant: no rank ever blocks inside MPI, where Python's signal handlers do not run. Transfers are
posted and tested; before `Dup` and `Split`, which exist in a blocking form only, all ranks meet in
a barrier that is tested.

Importing this module initialises MPI. It must come before torch: some MPI libraries choose their
network card at start and fail when torch has touched it.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn, final

import mpi4py
import numpy as np

from dtrain.comm.backends.base import Backend, Bytes, Request

mpi4py.rc.thread_level = "serialized"  # some transports do not support "multiple"
from mpi4py import MPI  # noqa: E402

SPINS = {True: 200, False: 400}
"""Turns of a wait before it starts to sleep, where the ranks of a host share cores and where not:
a wait that has lasted a millisecond loses nothing by a nap, and what else runs there wins.
"""


SLEEP_S = (50e-6, 200e-6)
"""Shortest and longest sleep."""


FIELD_BYTES = 1024
"""Room for the host's name and the mask of its cores."""


@final
class MpiRequest(Request):
    """A request of MPI; `count` is the size of a receive in bytes, None for a send."""

    def __init__(self, request: MPI.Request, count: int | None = None) -> None:
        self._request, self._count = request, count

    def test(self) -> bool:
        """Return whether it is complete; raise where a message of another size came."""
        if self._count is None:
            return self._request.Test()
        status = MPI.Status()
        if not self._request.Test(status):
            return False
        if (found := status.Get_count(MPI.BYTE)) != self._count:
            raise RuntimeError(
                f"message of {found} bytes from rank {status.source} with tag {status.tag} met a "
                f"receive of {self._count} bytes"
            )
        self._count = None  # from now on the request is null and its status empty
        return True


@final
class MpiBackend(Backend):
    """The ranks of a communicator.

    Parameters
    ----------
    comm : MPI.Intracomm
        Must not be used by anything else.
    hosts : sequence of str
        Host of each of its ranks.
    crowded : bool
        Whether the ranks of my host are more than its cores, so that waits must sleep.
    world : sequence of int, optional
        World rank of each of its ranks; default: it is the world.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        hosts: Sequence[str],
        oversubscribed: bool,
        world_ranks: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.hosts, self.library = tuple(hosts), library_version()
        self.world_ranks = tuple(range(comm.size) if world_ranks is None else world_ranks)
        self._comm, self._oversubscribed = comm, oversubscribed

    def isend(self, data: Bytes, dest: int, tag: int) -> Request:
        """Send (`MPI_Issend`)."""
        return MpiRequest(self._comm.Issend([data, data.size, MPI.BYTE], dest, tag))

    def irecv(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive (`MPI_Irecv`)."""
        return MpiRequest(self._comm.Irecv([data, data.size, MPI.BYTE], source, tag), data.size)

    def idle(self, turn: int, description: str) -> None:
        """Yield; after some turns sleep."""
        _yield_or_sleep(turn, self._oversubscribed)

    def split(self, color: int, key: int) -> MpiBackend:
        """Return the wire of the ranks with my colour. Collective."""
        _barrier(self._comm, self._oversubscribed)
        child = MPI.Intracomm(self._comm.Split(color, key))
        mine, theirs = child.Get_group(), self._comm.Get_group()
        ranks = MPI.Group.Translate_ranks(mine, list(range(child.size)), theirs)
        hosts, world = (
            [self.hosts[rank] for rank in ranks],
            [self.world_ranks[rank] for rank in ranks],
        )
        return MpiBackend(child, hosts, self._oversubscribed, world)

    def abort(self, code: int) -> NoReturn:
        """End all ranks (`MPI_Abort`)."""
        abort(code)


def world_size() -> int:
    """Return how many ranks MPI found; sends nothing."""
    return MPI.COMM_WORLD.size


def library_version() -> str:
    """Return name and version of the loaded MPI library."""
    return MPI.Get_library_version().splitlines()[0].split(",")[0].strip(" \0")


def abort(code: int) -> NoReturn:
    """End all ranks with this exit code; sends nothing."""
    MPI.COMM_WORLD.Abort(code)


def world_backend() -> MpiBackend:
    """Return the wire of all ranks. Collective."""
    _barrier(MPI.COMM_WORLD, oversubscribed=True)
    comm = MPI.Intracomm(MPI.COMM_WORLD.Dup())
    fields = np.zeros((comm.size, FIELD_BYTES), dtype=np.uint8)
    mine = f"{platform.node()} {_core_mask():x}".encode()
    fields[comm.rank, : len(mine)] = np.frombuffer(mine, dtype=np.uint8)
    _poll_until_complete(
        comm.Iallgather(MPI.IN_PLACE, [fields, FIELD_BYTES, MPI.BYTE]), oversubscribed=True
    )
    words = [field.tobytes().rstrip(b"\0").decode().split() for field in fields]
    hosts = [host for host, _ in words]
    here = hosts[comm.rank]
    cores = 0
    for host, mask in words:
        if host == here:
            cores |= int(mask, 16)
    return MpiBackend(comm, hosts, Counter(hosts)[here] > cores.bit_count())


def _core_mask() -> int:
    """Return the cores that this process may use, as a mask.

    Launchers may bind each rank to cores of its own, so a host's cores are what all its ranks'
    masks have together.
    """
    if hasattr(os, "sched_getaffinity"):
        return sum(1 << core for core in os.sched_getaffinity(0))
    return (1 << (os.cpu_count() or 1)) - 1


def _yield_or_sleep(turn: int, oversubscribed: bool) -> None:
    if turn >= SPINS[oversubscribed]:
        time.sleep(min(SLEEP_S[1], SLEEP_S[0] * (turn // SPINS[oversubscribed])))
    elif hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


def _poll_until_complete(request: MPI.Request, oversubscribed: bool) -> None:
    turn = 0
    while not request.Test():
        _yield_or_sleep(turn, oversubscribed)
        turn += 1


def _barrier(comm: MPI.Intracomm, oversubscribed: bool) -> None:
    """Return when all ranks are here."""
    _poll_until_complete(comm.Ibarrier(), oversubscribed)
