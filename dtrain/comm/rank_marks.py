"""Marks: files by which the parent of `--ranks` learns how far its ranks are.

Invariant: standard library only; never raises. A rank that reports an error, or leaves its session
in order, has removed its mark before it ends.

    parent of --ranks   makes a folder, names it in `DTRAIN_RANK_MARKS`, and deletes it at the end
                        ready-PID appears once a rank takes warnings; until then none is passed on
    rank 3              start-3 exists while MPI starts, session-3 while it is inside a session
    mpirun              its banner names the first rank that has ended, with its exit code
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

VARIABLE = "DTRAIN_RANK_MARKS"


IN_START, IN_SESSION = "start", "session"
"""Marks of a rank in the start of MPI, and inside a session."""


EXITED = re.compile(rb"Process name: \[[^]\n]*,(\d+)\]\s+Exit code:\s+(\d+)")
"""In the banner about a rank that has ended with an exit code."""


LEFT = re.compile(rb"process rank (\d+) with PID \d+ on node \S+ exiting\s+improperly")
"""In the banner about a rank that has ended with code 0, without MPI's end."""


class Exit(NamedTuple):
    """The first rank that has ended, and its exit code."""

    rank: int
    code: int


@contextmanager
def marks_folder() -> Iterator[Path | None]:
    """Make the folder of the marks; None: there is no space for one."""
    folder = None
    with suppress(OSError):
        # macOS's own TMPDIR is too long for the names of Open MPI's sockets, which come here, too.
        parent = "/tmp" if sys.platform == "darwin" else None
        folder = Path(tempfile.mkdtemp(prefix="dtrain-ranks-", dir=parent))
    try:
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def mark_ready() -> None:
    """Mark that no warning ends this rank from now on, if the parent wants to know it."""
    with suppress(OSError):
        if folder := os.environ.get(VARIABLE):
            (Path(folder) / f"ready-{os.getpid()}").touch()


def ready_ranks(folder: Path) -> int:
    """Return how many ranks no warning ends."""
    return len(list(folder.glob("ready-*")))


def set_mark(kind: str, rank: int) -> None:
    """Mark where a rank is, if the parent wants to know it."""
    with suppress(OSError):
        if folder := os.environ.get(VARIABLE):
            (Path(folder) / f"{kind}-{rank}").touch()


def remove_mark(kind: str, rank: int) -> None:
    """Mark that a rank is no longer there."""
    with suppress(OSError):
        if folder := os.environ.get(VARIABLE):
            (Path(folder) / f"{kind}-{rank}").unlink()


def has_mark(folder: Path | None, kind: str, rank: int) -> bool:
    """Return whether a rank has this mark."""
    return folder is not None and (folder / f"{kind}-{rank}").exists()


def first_exit(banners: bytes) -> Exit | None:
    """Return the first rank that has ended, as the banners of the launcher say."""
    if exited := EXITED.search(banners):
        return Exit(int(exited[1]), int(exited[2]))
    left = LEFT.search(banners)
    return None if left is None else Exit(int(left[1]), 0)
