"""The MPI backend, one process per rank; the only importer of mpi4py.

Invariant: no rank ever blocks inside MPI, where Python's signal handlers do not run. Transfers are
posted and tested. `Dup` and `Split` exist only in a blocking form, so a barrier that is tested
precedes them.

Importing this module initialises MPI. It must be imported before torch: some MPI libraries choose
their network card at start and fail when torch has touched it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NoReturn, final

import mpi4py
import numpy as np

from dtrain.comm.backends.base import Backend, Bytes, PointToPointRequest
from dtrain.comm.node_topology import NodeTopology

mpi4py.rc.thread_level = "serialized"  # some transports do not support "multiple"
from mpi4py import MPI  # noqa: E402

SPINS = {True: 200, False: 400}
"""Turns of a wait before it starts to sleep, by whether the host has more ranks than cores.

After a millisecond a short sleep costs the wait nothing, and other processes get the core.
"""


BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""A text of its own for each start of a kernel, which all containers of a node have in common."""


MIN_SLEEP_S, MAX_SLEEP_S = 50e-6, 200e-6


FIELD_BYTES = 1024
"""Bytes that a rank sends with its host's name, its node and the mask of its cores."""


@final
class MpiRequest(PointToPointRequest):
    """A request of MPI; `count` is the size of a receive in bytes, None for a send."""

    def __init__(self, request: MPI.Request, count: int | None = None) -> None:
        self._request = request
        self._count = count

    def test(self) -> bool:
        """Return whether it is complete; raise `RuntimeError` for a message of another size."""
        if self._count is None:
            return self._request.Test()
        status = MPI.Status()
        if not self._request.Test(status):
            return False
        if (count := status.Get_count(MPI.BYTE)) != self._count:
            raise RuntimeError(
                f"message of {count} bytes from rank {status.source} with tag {status.tag} met a "
                f"receive of {self._count} bytes"
            )
        self._count = None  # the request is null from now on, and its status empty
        return True

    def cancel(self) -> None:
        """Withdraw a receive (`MPI_Cancel`), which is a local operation."""
        self._request.Cancel()
        self._count = None
        while not self._request.Test():
            pass


@final
class MpiBackend(Backend):
    """The ranks of a communicator.

    Parameters
    ----------
    comm : MPI.Intracomm
        Nothing else may use it.
    hosts, nodes : sequence of str, and of int
        Host and node of each of its ranks.
    oversubscribed : bool
        Whether this host has more ranks than cores, so that waits must sleep.
    world_ranks : sequence of int, optional
        World rank of each of its ranks; default: it is the world.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        hosts: Sequence[str],
        nodes: Sequence[Hashable],
        oversubscribed: bool,
        world_ranks: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.hosts, self.nodes = tuple(hosts), tuple(nodes)
        self.library = library_version()
        self.world_ranks = tuple(range(comm.size) if world_ranks is None else world_ranks)
        self._comm = comm
        self._oversubscribed = oversubscribed

    def isend(self, data: Bytes, dest: int, tag: int) -> PointToPointRequest:
        """Send (`MPI_Issend`)."""
        return MpiRequest(self._comm.Issend([data, data.size, MPI.BYTE], dest, tag))

    def irecv(self, data: Bytes, source: int, tag: int) -> PointToPointRequest:
        """Receive (`MPI_Irecv`)."""
        return MpiRequest(self._comm.Irecv([data, data.size, MPI.BYTE], source, tag), data.size)

    def idle(self, turn: int, description: str) -> None:
        """Yield the core; after some turns sleep."""
        _yield_or_sleep(turn, self._oversubscribed)

    def split(self, color: int, key: int) -> MpiBackend:
        """Return the backend of the ranks of this colour. Collective over the group."""
        _barrier(self._comm, self._oversubscribed)
        child = MPI.Intracomm(self._comm.Split(color, key))
        ranks = MPI.Group.Translate_ranks(
            child.Get_group(), list(range(child.size)), self._comm.Get_group()
        )
        hosts = [self.hosts[rank] for rank in ranks]
        nodes = [self.nodes[rank] for rank in ranks]
        world_ranks = [self.world_ranks[rank] for rank in ranks]
        return MpiBackend(child, hosts, nodes, self._oversubscribed, world_ranks)

    def abort(self, code: int) -> NoReturn:
        """End all ranks (`MPI_Abort`)."""
        abort(code)


def world_size() -> int:
    """Return the number of ranks that MPI started; sends nothing."""
    return MPI.COMM_WORLD.size


def library_version() -> str:
    """Return name and version of the loaded MPI library."""
    return MPI.Get_library_version().splitlines()[0].split(",")[0].strip(" \0")


def thread_level() -> str:
    """Return the level of threads that the library provides, in MPI's words; sends nothing."""
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    return levels.get(MPI.Query_thread(), "unknown")


def abort(code: int) -> NoReturn:
    """End all ranks with this exit code; sends nothing."""
    MPI.COMM_WORLD.Abort(code)


def world_backend() -> MpiBackend:
    """Return the backend of all ranks. Collective over all ranks."""
    _barrier(MPI.COMM_WORLD, oversubscribed=True)
    comm = MPI.Intracomm(MPI.COMM_WORLD.Dup())
    fields = np.zeros((comm.size, FIELD_BYTES), dtype=np.uint8)
    own_field = f"{platform.node()} {_node_key(comm)} {_core_mask():x}".encode()
    fields[comm.rank, : len(own_field)] = np.frombuffer(own_field, dtype=np.uint8)
    _poll_until_complete(
        comm.Iallgather(MPI.IN_PLACE, [fields, FIELD_BYTES, MPI.BYTE]), oversubscribed=True
    )
    rows = [field.tobytes().rstrip(b"\0").decode().split() for field in fields]
    hosts, nodes = [host for host, _, _ in rows], [node for _, node, _ in rows]
    node_ranks = NodeTopology(nodes, comm.rank).node_ranks
    cores = 0
    for rank in node_ranks:
        cores |= int(rows[rank][2], 16)
    return MpiBackend(comm, hosts, nodes, len(node_ranks) > cores.bit_count())


def _node_key(comm: MPI.Intracomm) -> str:
    """Return a text that the ranks of this node have in common. Collective over `comm`.

    MPI says which ranks share memory, by its first rank. Some libraries go by the host name where
    the launcher tells them nothing, so the key names the running kernel, too.
    """
    _barrier(comm, oversubscribed=True)
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = MPI.Group.Translate_ranks(node.Get_group(), [0], comm.Get_group())[0]
    node.Free()
    try:
        kernel = BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        kernel = ""
    return f"{first}-{kernel}"


def _core_mask() -> int:
    """Return the cores that this process may use, as a mask.

    Launchers may bind each rank to cores of its own, so a host's cores are the union over its
    ranks.
    """
    if hasattr(os, "sched_getaffinity"):
        return sum(1 << core for core in os.sched_getaffinity(0))
    return (1 << (os.cpu_count() or 1)) - 1


def _yield_or_sleep(turn: int, oversubscribed: bool) -> None:
    if turn >= SPINS[oversubscribed]:
        time.sleep(min(MAX_SLEEP_S, MIN_SLEEP_S * (turn // SPINS[oversubscribed])))
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
    """Return when all ranks have called this. Collective over `comm`."""
    _poll_until_complete(comm.Ibarrier(), oversubscribed)
