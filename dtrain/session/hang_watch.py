"""HangWatch: the watchdog of a session, and the end of a run that hangs.

Invariant: only a rank that is a process of its own has one, since it ends its process.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import final

from dtrain.checkpoint import run_folder
from dtrain.comm.communicator import Comm
from dtrain.comm.flight_recorder import flush_output, print_error
from dtrain.comm.launcher_detection import job_name
from dtrain.comm.rank_marks import IN_SESSION, remove_mark, set_mark
from dtrain.config.sections import Timeouts
from dtrain.errors import DtrainError
from dtrain.mesh import RankMesh
from dtrain.rank_process import is_rank_of
from dtrain.session.folder_lock import FolderLock
from dtrain.watchdog.limits import Limits
from dtrain.watchdog.watchdog import Watchdog

ABORT_S = 5.0
"""Seconds that the end of a job may take before this process ends by itself."""


@final
class HangWatch:
    """Watches the sections of a session.

    Parameters
    ----------
    comm : Comm
        All ranks.
    timeouts : Timeouts
        The limits of the run file.
    out : Path
        The run folder.
    lock : FolderLock
        The lock of the run folder, which the report releases.
    """

    def __init__(self, comm: Comm, timeouts: Timeouts, out: Path, lock: FolderLock) -> None:
        self._comm = comm
        self._out = out
        self._lock = lock
        self._names = [
            f"rank {rank} of {comm.size} on {host}" for rank, host in enumerate(comm.hosts)
        ]
        folder = out.parent / f".{out.name}.{job_name(os.environ)}"
        limits = Limits(timeouts.by_section() if is_rank_of(comm) else {})
        self._watchdog = Watchdog(comm.flight, self._names, comm.hosts, limits, folder, self._end)
        set_mark(IN_SESSION, comm.rank)
        comm.flight.enter("start")
        self._watchdog.start()

    def use_run_folder(self, mesh: RankMesh) -> None:
        """Write into the run folder, which is locked, and name replica and stage of ranks."""
        self._watchdog.use_run_folder(self._out, self._out / run_folder.FLIGHT_FOLDER)
        for rank, name in enumerate(self._names):
            replica, stage = mesh.coords(rank)
            self._names[rank] = f"{name} (replica {replica} stage {stage})"

    def close(self) -> None:
        """End the watch."""
        remove_mark(IN_SESSION, self._comm.rank)
        self._comm.flight.enter(None)
        self._watchdog.stop()

    def _end(self, error: DtrainError) -> None:
        """Report the error and end all ranks; called in a thread of the watchdog."""
        timer = threading.Timer(ABORT_S, os._exit, [error.code])
        timer.daemon = True
        timer.start()
        remove_mark(IN_SESSION, self._comm.rank)
        print_error(f"dtrain: {error.text_with_key()}")
        owner = self._lock.owner
        if owner is not None:
            run_folder.release_unfinished(self._out, owner, "failed", error.message, error.key)
        flush_output()
        if self._comm.size > 1:
            self._comm.abort(error.code)
        os._exit(error.code)
