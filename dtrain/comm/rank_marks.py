"""Marks: by files the parent of `--ranks` learns that a rank has ended inside a session.

Invariant: standard library only; never raises. A rank that reports an error, or leaves its session
in order, has removed its mark before it ends.

    parent of --ranks   makes a folder, names it in `DTRAIN_RANK_MARKS`, and deletes it at the end
    rank 3              rank-3 exists from the start of its session to its end
    mpirun              its banner names the first rank that has ended, with its exit code
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

VARIABLE = "DTRAIN_RANK_MARKS"


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
        folder = Path(tempfile.mkdtemp(prefix="dtrain-ranks-"))
    try:
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def set_mark(rank: int) -> None:
    """Mark that a rank is inside a session, if the parent wants to know it."""
    with suppress(OSError):
        if folder := os.environ.get(VARIABLE):
            (Path(folder) / f"rank-{rank}").touch()


def remove_mark(rank: int) -> None:
    """Mark that a rank is outside of any session."""
    with suppress(OSError):
        if folder := os.environ.get(VARIABLE):
            (Path(folder) / f"rank-{rank}").unlink()


def lost_rank(banners: bytes, folder: Path | None) -> Exit | None:
    """Return the first rank that has ended, if it was inside a session; else None.

    Parameters
    ----------
    banners : bytes
        Those of the launcher.
    folder : Path or None
        The folder of the marks.
    """
    if folder is None:
        return None
    if exited := EXITED.search(banners):
        end = Exit(int(exited[1]), int(exited[2]))
    elif left := LEFT.search(banners):
        end = Exit(int(left[1]), 0)
    else:
        return None
    return end if (folder / f"rank-{end.rank}").exists() else None
