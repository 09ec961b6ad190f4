"""Memory that the ranks of one node share: one copy, which each of them reads and writes.

Invariant: the memory has no name in any file system, so none is left when ranks are killed, and the
size of /dev/shm does not limit it. All ranks get it, or none does.

    rank 0      makes an anonymous file (`memfd_create`) and names its process and descriptor
    all ranks   open /proc/PROCESS/fd/DESCRIPTOR, compare a random key, map the file,
                reserve a part each: its pages are then near this rank
    all ranks   agree that all of them could, and close the file; the maps keep the memory

Ranks that are threads of one process share a plain array. `MPI_Win_allocate_shared` is not used: it
may wait inside MPI, it lies in /dev/shm in some libraries, and it ends with MPI.
"""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from dtrain.comm.backends.base import Bytes

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm

_PROCESS = secrets.token_hex(8)
"""Names this process; equal process numbers may be in different containers."""


_ARRAYS: dict[str, Bytes] = {}
"""Arrays on their way to other threads of this process."""


KEY_BYTES = 16


RESERVED_BYTES = 64 << 20
"""Bytes that one call reserves; a signal in the middle takes back what the call has reserved."""


def allocate_shared(comm: Comm, size_bytes: int) -> Bytes | None:
    """Return zeros that all ranks of a node share; see `Comm.allocate_shared`."""
    if len(comm.topology.nodes) > 1:
        raise ValueError(f"{comm.name} has ranks on {comm.node_count} nodes: split it by node")
    if size_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    if len(set(comm.allgather_object(_PROCESS))) == 1:
        return _share_array(comm, size_bytes)
    return _share_file(comm, size_bytes)


def _share_array(comm: Comm, size_bytes: int) -> Bytes | None:
    """Return one array on all ranks, which are threads of this process."""
    key = None
    if comm.rank == 0:
        with suppress(MemoryError):
            array = np.zeros(size_bytes, np.uint8)
            key = secrets.token_hex(KEY_BYTES)
            _ARRAYS[key] = array
    key = comm.allgather_object(key)[0]
    shared = _ARRAYS.get(key)
    comm.allgather_object(None)
    _ARRAYS.pop(key, None)
    return shared


def _share_file(comm: Comm, size_bytes: int) -> Bytes | None:
    """Return one anonymous file as an array on all ranks, None where one of them has no access."""
    length = size_bytes + KEY_BYTES
    key, descriptor, offer = secrets.token_bytes(KEY_BYTES), -1, None
    try:
        if comm.rank == 0:
            with suppress(OSError, AttributeError):  # AttributeError: no such call on this system
                descriptor = os.memfd_create("dtrain", os.MFD_CLOEXEC)
                os.ftruncate(descriptor, length)
                os.pwrite(descriptor, key, size_bytes)
                offer = os.getpid(), descriptor, key.hex()
        offer = comm.allgather_object(offer)[0]
        if offer is None:
            return None
        process, number, text = offer
        memory = None
        with suppress(OSError, ValueError):
            path = f"/proc/{process}/fd/{number}"
            memory = _map_file(path, size_bytes, bytes.fromhex(text), comm.rank, comm.size)
        is_complete = all(comm.allgather_object(memory is not None))
        return memory if is_complete else None
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _map_file(path: str, size_bytes: int, key: bytes, rank: int, ranks: int) -> Bytes | None:
    """Map rank 0's file and reserve this rank's part of it; None if it is another file.

    Raises
    ------
    OSError, ValueError
        There is no such file, no access to it or no memory.
    """
    length = size_bytes + len(key)
    if os.stat(path).st_size != length:
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(descriptor, len(key), size_bytes) != key:
            return None
        mapped = mmap.mmap(descriptor, length)
        start, stop = (length * part // ranks for part in (rank, rank + 1))
        for offset in range(start, stop, RESERVED_BYTES):
            os.posix_fallocate(descriptor, offset, min(RESERVED_BYTES, stop - offset))
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, np.uint8, size_bytes)
