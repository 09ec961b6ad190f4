"""The end of a run that fails: one report, from the rank that failed first.

Invariant: an error that all ranks raise is reported by rank 0. Otherwise the first rank to release
the run folder reports; the others delay their report, and the end of the job comes before it.
"""

from __future__ import annotations

import time
from pathlib import Path

from dtrain.checkpoint import run_folder
from dtrain.checkpoint.ownership import Owner
from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError, Interrupted, add_location, one_line
from dtrain.rank_process import launcher_loss

REPORT_DELAY_S = 2.0
"""Seconds by which a rank that fails after another one delays its report."""


def report_failure(error: BaseException, comm: Comm, out: Path, owner: Owner | None) -> None:
    """Record how the run ended, and delay the report of all ranks that fail but the first.

    The first report ends the job, so only that one is printed. A rank that a signal stops has
    written its flight record already, before its waits ended.
    """
    if isinstance(error, Interrupted) and error.on_all_ranks:  # of another session
        return
    if isinstance(error, DtrainError) and error.on_all_ranks:
        if owner is not None and comm.rank == 0:
            run_folder.release_unfinished(out, owner, "failed", str(error), error.key)
        return
    is_stopped = isinstance(error, Interrupted)
    if not is_stopped:
        add_location(error, f"[{comm.flight.name}]")
        if comm.flight.folder is not None:
            comm.flight.dump(one_line(error), error)
    is_first = comm.rank == 0
    if owner is not None:
        status = "stopped" if is_stopped else "failed"
        loss = None if isinstance(error, DtrainError) else launcher_loss()
        cause = loss or error
        key = cause.key if isinstance(cause, (DtrainError, Interrupted)) else None
        is_first = run_folder.release_unfinished(out, owner, status, one_line(cause), key)
    comm.flight.close()
    if isinstance(error, Interrupted):
        error.quiet = not is_first
    if not is_first:
        try:
            time.sleep(REPORT_DELAY_S)
        except Interrupted as signal:  # the first report has ended the job
            signal.quiet = True
            raise
