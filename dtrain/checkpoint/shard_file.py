"""Write a file of a checkpoint; local disks are written past the page cache.

Invariant: the hash is that of the bytes in memory, so it finds a byte that was written wrongly.

::

    page cache   tensors --> pages of the kernel --> disk    first use of a page is slow
    direct       tensors --> one aligned buffer  --> disk    from aligned memory without the buffer
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np
from xxhash import xxh3_128

from dtrain.checkpoint import files
from dtrain.checkpoint.files import open_plain_file

PART_BYTES = 1 << 24
"""Bytes that are written or hashed at once."""


JOINED_BYTES = 1 << 20
"""Smaller parts are joined up to about this size."""


BUFFER_BYTES = 1 << 22


DIRECT_BYTES = 1 << 22
"""Smaller files go through the page cache."""


ALIGNMENT = 4096
"""Of memory, position and length of a direct write; a multiple of the blocks of all disks."""


LOCAL_TYPES = ("ext4", "xfs")
"""File systems of local disks that take direct writes; those over a network were not measured."""


SHARD_HASH, HASH_BYTES = "xxh3", 16
"""Key of a hash in a manifest, and its length: XXH3 with 128 bits finds damage, ten times faster
than SHA-256."""


def write_file_of_parts(
    path: Path, parts: Iterable[Any], size: int, check: Callable[[], None] = lambda: None
) -> str:
    """Write a new file of these parts and sync it; return its hash.

    Parameters
    ----------
    parts : iterable of buffers
        The content.
    size : int
        Bytes of all parts.
    check : callable
        Called between two writes; an error that it raises ends the work.

    Raises
    ------
    OSError
        The first error of the disk.
    """
    digest = xxh3_128()
    descriptor = files.calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        direct = size >= DIRECT_BYTES and is_on_local_disk(path.parent)
        write: Callable[[memoryview], None]
        writer = DirectWriter(descriptor) if direct else None
        write = (lambda part: files.write_all(descriptor, part)) if writer is None else writer.write
        for part in _split(parts):
            check()
            digest.update(part)
            write(part)
        if writer is not None:
            writer.finish()
        files.calls.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def copy_file(source: Path, target: Path, check: Callable[[], None]) -> str:
    """Copy a file and sync the copy; return its hash. `check` is that of `write_file_of_parts`."""
    with open_plain_file(source) as file:
        parts = iter(lambda: file.read(PART_BYTES), b"")
        return write_file_of_parts(target, parts, os.fstat(file.fileno()).st_size, check)


def hash_file(path: Path) -> str:
    """Return the hash of a plain file.

    Raises
    ------
    OSError
        The file is missing, or no plain file.
    """
    digest = xxh3_128()
    with open_plain_file(path) as file:
        while part := file.read(PART_BYTES):
            digest.update(part)
    return digest.hexdigest()


@final
class DirectWriter:
    """Writes a file past the page cache; where the file system refuses that, through it.

    Parameters
    ----------
    descriptor : int
        A new file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        self._filled = 0
        self._is_direct = False
        self._set_direct(True)

    def write(self, part: memoryview) -> None:
        """Write a part, or keep it for the next write; from aligned memory without a copy."""
        if not self._filled and self._is_direct and _address(part) % ALIGNMENT == 0:
            whole = len(part) // ALIGNMENT * ALIGNMENT
            self._put(part[:whole])
            part = part[whole:]
        while part:
            taken = part[: BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            part = part[len(taken) :]
            if self._filled == BUFFER_BYTES:
                self._put(self._buffer)
                self._filled = 0

    def finish(self) -> None:
        """Write the rest; the end of the last block goes through the page cache."""
        whole = self._filled // ALIGNMENT * ALIGNMENT
        self._put(self._buffer[:whole])
        self._set_direct(False)
        self._put(self._buffer[whole : self._filled])

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                written = files.calls.write(self._descriptor, data)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._set_direct(False)
                continue
            if written == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[written:]
            if written % ALIGNMENT:
                self._set_direct(False)

    def _set_direct(self, wanted: bool) -> None:
        """Switch direct writes on or off; they stay off where the file system has none."""
        direct = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~direct
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | (direct if wanted else 0))
        except OSError:
            return
        self._is_direct = wanted and direct != 0


def is_on_local_disk(folder: Path) -> bool:
    """Return whether a folder is on a file system of `LOCAL_TYPES`."""
    return _file_system(os.stat(folder).st_dev) in LOCAL_TYPES


@lru_cache
def _file_system(device: int) -> str:
    """Return the type of the file system on a device; empty if it is unknown."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        left, _, right = line.partition(" - ")
        if left.split()[2:3] == [number]:
            return right.split()[0]
    return ""


def _address(part: memoryview) -> int:
    return int(np.frombuffer(part, dtype=np.uint8).ctypes.data)


def _split(parts: Iterable[Any]) -> Iterator[memoryview]:
    """Yield the parts in pieces that are neither very small nor very large."""
    joined = bytearray()
    for part in parts:
        view = memoryview(part)
        if len(joined) + len(view) <= JOINED_BYTES:
            joined += view
            continue
        if joined:
            yield memoryview(bytes(joined))
            joined.clear()
        for start in range(0, len(view), PART_BYTES):
            yield view[start : start + PART_BYTES]
    if joined:
        yield memoryview(bytes(joined))
