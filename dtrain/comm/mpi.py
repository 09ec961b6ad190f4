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

from dtrain.comm.wire import Bytes, Request, Wire

mpi4py.rc.thread_level = "serialized"  # some transports do not support "multiple"
from mpi4py import MPI  # noqa: E402

SPINS = {True: 200, False: 400}
"""Turns of a wait before it starts to sleep, where the ranks of a host share cores and where not:
a wait that has lasted a millisecond loses nothing by a nap, and what else runs there wins.
"""

NAP_S = (50e-6, 200e-6)
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
class MpiWire(Wire):
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
        crowded: bool,
        world: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.hosts, self.library = tuple(hosts), library()
        self.world = tuple(range(comm.size) if world is None else world)
        self._comm, self._crowded = comm, crowded

    def isend(self, data: Bytes, to: int, tag: int) -> Request:
        """Send (`MPI_Issend`)."""
        return MpiRequest(self._comm.Issend([data, data.size, MPI.BYTE], to, tag))

    def irecv(self, data: Bytes, source: int, tag: int) -> Request:
        """Receive (`MPI_Irecv`)."""
        return MpiRequest(self._comm.Irecv([data, data.size, MPI.BYTE], source, tag), data.size)

    def idle(self, turn: int, what: str) -> None:
        """Yield; after some turns sleep."""
        _rest(turn, self._crowded)

    def split(self, color: int, key: int) -> MpiWire:
        """Return the wire of the ranks with my colour. Collective."""
        _meet(self._comm, self._crowded)
        child = MPI.Intracomm(self._comm.Split(color, key))
        mine, theirs = child.Get_group(), self._comm.Get_group()
        ranks = MPI.Group.Translate_ranks(mine, list(range(child.size)), theirs)
        hosts, world = [self.hosts[rank] for rank in ranks], [self.world[rank] for rank in ranks]
        return MpiWire(child, hosts, self._crowded, world)

    def abort(self, code: int) -> NoReturn:
        """End all ranks (`MPI_Abort`)."""
        abort(code)


def size() -> int:
    """Return how many ranks MPI found; sends nothing."""
    return MPI.COMM_WORLD.size


def library() -> str:
    """Return name and version of the loaded MPI library."""
    return MPI.Get_library_version().splitlines()[0].split(",")[0].strip(" \0")


def abort(code: int) -> NoReturn:
    """End all ranks with this exit code; sends nothing."""
    MPI.COMM_WORLD.Abort(code)


def world() -> MpiWire:
    """Return the wire of all ranks. Collective."""
    _meet(MPI.COMM_WORLD, crowded=True)
    comm = MPI.Intracomm(MPI.COMM_WORLD.Dup())
    fields = np.zeros((comm.size, FIELD_BYTES), dtype=np.uint8)
    mine = f"{platform.node()} {_cores():x}".encode()
    fields[comm.rank, : len(mine)] = np.frombuffer(mine, dtype=np.uint8)
    _polled(comm.Iallgather(MPI.IN_PLACE, [fields, FIELD_BYTES, MPI.BYTE]), crowded=True)
    words = [field.tobytes().rstrip(b"\0").decode().split() for field in fields]
    hosts = [host for host, _ in words]
    here = hosts[comm.rank]
    cores = 0
    for host, mask in words:
        if host == here:
            cores |= int(mask, 16)
    return MpiWire(comm, hosts, Counter(hosts)[here] > cores.bit_count())


def _cores() -> int:
    """Return the cores that this process may use, as a mask.

    Launchers may bind each rank to cores of its own, so a host's cores are what all its ranks'
    masks have together.
    """
    if hasattr(os, "sched_getaffinity"):
        return sum(1 << core for core in os.sched_getaffinity(0))
    return (1 << (os.cpu_count() or 1)) - 1


def _rest(turn: int, crowded: bool) -> None:
    if turn >= SPINS[crowded]:
        time.sleep(min(NAP_S[1], NAP_S[0] * (turn // SPINS[crowded])))
    elif hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


def _polled(request: MPI.Request, crowded: bool) -> None:
    turn = 0
    while not request.Test():
        _rest(turn, crowded)
        turn += 1


def _meet(comm: MPI.Intracomm, crowded: bool) -> None:
    """Return when all ranks are here."""
    _polled(comm.Ibarrier(), crowded)
