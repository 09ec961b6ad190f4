"""The state of processes of this host whose ranks do not answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from dtrain.monitoring.flight_request import find_processes

GONE = "has ended or left its session"


STATES = {
    "T": "is stopped, by SIGSTOP or a debugger",
    "t": "is stopped by a debugger",
    "D": "is inside a system call that does not return (a file system or a device)",
    "Z": GONE,
}
"""Texts by the letter of /proc."""


def silent_states(
    silent: Collection[int], hosts: Sequence[str], rank: int, folder: Path | None
) -> dict[int, str]:
    """Return what is known about silent ranks, by rank; nothing of those on other hosts.

    Parameters
    ----------
    hosts : sequence of str
        The host of every rank.
    rank : int
        A rank on this host.
    folder : Path or None
        The run folder, once ranks write flight records there.
    """
    here = [other for other in silent if hosts[other] == hosts[rank]]
    if folder is None or not here or not Path("/proc/self/fd").exists():
        return {}
    processes = find_processes(folder)
    states = {other: _state(processes.get(other)) for other in here}
    return {other: state for other, state in states.items() if state}


def _state(process: int | None) -> str:
    """Return what is known about a process, None: there is none; empty: it seems to work."""
    if process is None:
        return GONE
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return GONE
    return STATES.get(stat.rpartition(")")[2].split()[0], "")
