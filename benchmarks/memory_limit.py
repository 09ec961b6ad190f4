"""Run programs under a limit of memory that the kernel keeps (a control group).

Page cache counts against the limit, as it does for a job of a batch system. Needs root and a
writable control group of memory, of version 1 or 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOTS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[list[str]]:
    """Yield the words that, put before a command, run it under the limit.

    Raises
    ------
    OSError
        No control group can be made.
    """
    folder = _make_group(limit_bytes)
    join = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
    try:
        yield ["sh", "-c", join, str(folder)]
    finally:
        with suppress(OSError):
            folder.rmdir()


def _make_group(limit_bytes: int) -> Path:
    error: OSError | None = None
    for root, name in ROOTS:
        folder = root / f"dtrain-bench-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / name).write_text(str(limit_bytes))
        except OSError as caught:
            error = caught
            with suppress(OSError):
                folder.rmdir()
            continue
        return folder
    assert error is not None
    raise error


def drop_cached(paths: Sequence[Path]) -> None:
    """Let the kernel forget the cached pages of files, so that they are read from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
