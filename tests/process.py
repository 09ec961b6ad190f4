"""Start programs from a test, and kill every process that they leave behind.

Invariant: a program and all that it starts carry a mark in their environment. Ranks leave the
process group of their launcher and outlive it, so they are found by the mark (on Linux; elsewhere
by the process group).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dtrain.comm.launcher import SESSION_FOLDER_VARIABLE


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Parameters
    ----------
    code : int
        Its exit status; negative: the signal that ended it.
    out, err : str
        What it wrote.
    wall_s : float
        How long it ran.
    late : bool
        It, or a process that holds its output open, reached the limit and was killed.
    left : tuple of str
        Command lines of the processes that it left behind (if late: that were running), now killed.
    """

    code: int
    out: str
    err: str
    wall_s: float
    late: bool
    left: tuple[str, ...]


def start(
    argv: Sequence[str | Path],
    limit_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    grace_s: float = 3.0,
) -> Ended:
    """Run a program to its end, or to its limit, and return how it ended.

    `env` is its whole environment (None: this process's). Its processes may end up to `grace_s`
    seconds later before they count as left behind. An mpirun of Open MPI gets a parent of its own
    for its session folder, since it cannot start where a killed one with its process id left one.
    """
    mark = f"DTRAIN_MARK={uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="dtrain-test-", ignore_cleanup_errors=True) as folder:
        session = {SESSION_FOLDER_VARIABLE: folder}
        marked = session | dict(os.environ if env is None else env) | dict([mark.split("=")])
        return _run(argv, mark, marked, cwd, limit_s, grace_s)


def _run(
    argv: Sequence[str | Path],
    mark: str,
    environ: Mapping[str, str],
    cwd: Path | None,
    limit_s: float,
    grace_s: float,
) -> Ended:
    """Run a program whose environment has `mark`."""
    began, late = time.monotonic(), False
    child = subprocess.Popen(
        [str(word) for word in argv],
        env=environ,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=limit_s)
        wall_s = time.monotonic() - began
        left = remain(mark, grace_s)
    except subprocess.TimeoutExpired:
        late, wall_s = True, limit_s
        left = remain(mark, 0.0)
        kill(child.pid, mark)
        out, err = child.communicate()
    finally:
        kill(child.pid, mark)
    return Ended(child.returncode, out, err, wall_s, late, left)


def carriers(mark: str) -> list[int]:
    """Return the living processes whose environment has `mark`, this one excepted."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
    return [pid for pid in pids if pid != os.getpid()]


def remain(mark: str, grace_s: float) -> tuple[str, ...]:
    """Return the command lines of the carriers that still run after `grace_s` seconds."""
    deadline = time.monotonic() + grace_s
    while (pids := carriers(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return tuple(command(pid) for pid in pids)


def command(pid: int) -> str:
    """Return a process's command line; empty where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def kill(group: int, mark: str) -> None:
    """Kill a process group and all carriers of a mark."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    sweep(mark)


def sweep(mark: str) -> None:
    """Kill all carriers of a mark, including those that start meanwhile."""
    while pids := carriers(mark):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    # python -m tests.process KEY=VALUE: kill what an interrupted run left behind.
    sweep(sys.argv[1])
