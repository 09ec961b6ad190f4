"""Write files so that they are whole even after a power cut, for every reader.

Invariant: every change to the files of a run folder is one of the `calls`, so that a test can stop
a run between any two of them, or let any of them fail.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of `renameat2`, from Linux's headers."""


class FileCalls:
    """The system calls that change files; a test replaces `calls` by a subclass."""

    def open(self, path: str | Path, flags: int) -> int:
        """Open a file for writing, and make it on demand; return its descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write to a file; return the number of bytes that were written."""
        return os.write(descriptor, data)

    def truncate(self, descriptor: int, size: int) -> None:
        """Change the length of a file."""
        os.ftruncate(descriptor, size)

    def fsync(self, descriptor: int) -> None:
        """Make a file, or the names in a folder, survive a power cut."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder, over a file that is there."""
        os.replace(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        """Exchange two names at once.

        Raises
        ------
        OSError
            The system or the file system cannot do it, for example.
        """
        paths = os.fsencode(one), os.fsencode(other)
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one))

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name of a file."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make a folder."""
        os.mkdir(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)


calls = FileCalls()
"""The system calls of this process."""


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data` to a file; one call of the kernel takes less than 2 GiB.

    Raises
    ------
    OSError
        The disk is full, for example.
    """
    rest = memoryview(data).cast("B")
    while rest:
        written = calls.write(descriptor, rest)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[written:]


def write_file(path: Path, content: bytes | str, sync: bool = False) -> None:
    """Write a file anew.

    Parameters
    ----------
    content : bytes or str
        A text is written in UTF-8.
    sync : bool
        Make its content survive a power cut.
    """
    data = content.encode() if isinstance(content, str) else content
    descriptor = calls.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(descriptor, data)
        if sync:
            calls.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file that readers find whole, or as it was before."""
    with replacing(path) as draft:
        write_file(draft, content)


def make_folder(path: Path) -> None:
    """Make a folder that is not there, and those above it; each survives a power cut."""
    if not path.parent.is_dir():
        make_folder(path.parent)
    try:
        calls.mkdir(path)
    except FileExistsError:
        if not path.is_dir():  # else another process was faster
            raise
    fsync(path.parent)


def delete_folder(folder: Path) -> None:
    """Delete a folder; of a link to a folder, the link alone.

    Raises
    ------
    OSError
        A part of it cannot be deleted.
    """
    if folder.is_symlink():
        calls.unlink(folder)
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            delete_folder(path)
        else:
            calls.unlink(path)
    calls.rmdir(folder)


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
        calls.rename(draft, path)
    finally:
        if draft.exists():
            with suppress(OSError):
                calls.unlink(draft)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        calls.fsync(descriptor)
    finally:
        os.close(descriptor)


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
