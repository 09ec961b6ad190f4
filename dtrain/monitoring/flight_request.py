"""Ask the ranks of a run that are processes of this host for their flight records.

Invariant: a signal is sent only to a process that holds the file `flight/rank-NNNNN.stacks` of this
run open. `FlightRecorder.set_folder` opens it and sets the handler of the signal, so the signal
ends no process.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from dtrain.checkpoint.run_folder import FLIGHT_FOLDER
from dtrain.comm.flight_recorder import FLIGHT_SIGNAL

ANSWER_S = 2.0
"""Seconds in which a rank that returns to Python writes its record."""


POLL_S = 0.02

STACKS_NAME = re.compile(r"rank-(\d{5,})\.stacks")

Processes = dict[int, int]
"""Process numbers by rank."""


def find_processes(folder: Path) -> Processes:
    """Return the processes of this host that are ranks of a run; empty without /proc.

    Parameters
    ----------
    folder : Path
        The run folder.
    """
    flight = str((folder / FLIGHT_FOLDER).resolve())
    found: dict[int, set[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        for rank in _ranks_of_process(process, flight):
            found.setdefault(rank, set()).add(int(process.name))
    # A process that a rank has forked holds the file, too.
    return {
        rank: min(pid for pid in pids if len(pids) == 1 or _parent(pid) not in pids)
        for rank, pids in found.items()
    }


def request_records(folder: Path, processes: Processes) -> set[int]:
    """Signal the processes and wait for their records; return the ranks that wrote one.

    Parameters
    ----------
    folder : Path
        The run folder.
    processes : dict of int to int
        As `find_processes` returns them.
    """
    paths = {rank: folder / FLIGHT_FOLDER / f"rank-{rank:05d}.txt" for rank in processes}
    before = {rank: _version(path) for rank, path in paths.items()}
    for pid in processes.values():
        with suppress(OSError):  # it has ended
            os.kill(pid, FLIGHT_SIGNAL)
    deadline = time.monotonic() + ANSWER_S
    answered: set[int] = set()
    while len(answered) < len(processes) and time.monotonic() < deadline:
        time.sleep(POLL_S)
        answered = {rank for rank, path in paths.items() if _version(path) != before[rank]}
    return answered


def _ranks_of_process(process: Path, flight: str) -> set[int]:
    """Return the ranks whose stacks files in the folder `flight` a process holds open."""
    ranks: set[int] = set()
    with suppress(OSError):  # another user's, or ended
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                parent, _, name = os.readlink(descriptor).rpartition("/")
                match = STACKS_NAME.fullmatch(name) if parent == flight else None
                if match is not None:
                    ranks.add(int(match[1]))
    return ranks


def _parent(pid: int) -> int:
    """Return the number of a process's parent, 0 where it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return int(stat.rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _version(path: Path) -> tuple[int, int]:
    """Return what changes when a file is replaced."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_ino, stat.st_mtime_ns
