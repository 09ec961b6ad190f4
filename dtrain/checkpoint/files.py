"""Write files so that they are whole even after a power cut, for every reader."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a draft that replaces the file `path` when the block ends without an error.

    Raises
    ------
    OSError
        The draft cannot be put in the place of the file.
    """
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a plain file.

    Raises
    ------
    OSError
        The file is missing, or no plain file.
    """
    with open_plain_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_plain_file(path: Path, limit: int) -> bytes:
    """Return the content of a plain file of at most `limit` bytes.

    Raises
    ------
    OSError
        The file is missing, too large or no plain file.
    """
    with open_plain_file(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(f"{path.name} has more than {limit} bytes")
        return file.read(limit)


def open_plain_file(path: Path) -> BufferedReader:
    """Open a plain file for reading; a link is not followed, and a pipe is not waited for.

    Raises
    ------
    OSError
        The file is missing, or no plain file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is no plain file")
    return open(descriptor, "rb")
