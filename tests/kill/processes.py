"""The processes of a run by their roles, and their deaths; standard library only.

::

    python -m dtrain run SCRIPT --ranks N     "launcher"
      +-- mpirun                              "mpirun"
            +-- rank 0 ... rank N-1           "rank": one of them; "all": all of them
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

TARGETS = ("rank", "launcher", "all", "rank", "rank", "launcher", "all", "mpirun")
"""What is killed, in turn. Ranks notice the death of mpirun late, so it is rarer."""


def parent(process: int) -> int:
    """Return the parent of a process; 0 where it is gone."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def children(process: int) -> list[int]:
    """Return the children of a process in the order of their start."""
    pids = sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return [pid for pid in pids if parent(pid) == process]


def kill(targets: Iterable[int], last: int = 0) -> None:
    """Kill processes; `last` after all others."""
    for process in sorted(targets, key=lambda process: process == last):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def find_targets(target: str, launcher: int, number: int) -> list[int]:
    """Return the processes that a kill is to hit, those that exist; `number` chooses a rank."""
    if target == "launcher":
        return [launcher]
    starters = children(launcher)
    if target == "mpirun":
        return starters
    ranks = [rank for starter in starters for rank in children(starter)]
    return ranks if target == "all" or not ranks else [ranks[number % len(ranks)]]
