"""The process of one rank: the start of MPI, signals, and an end that no other rank waits for.

Invariant: a rank that fails ends the job, whether the command line or a user's script runs in it.
An error that all ranks raise is printed once. A process that a rank forks is no rank: signals and
errors end that process alone, and it writes no flight record.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from dtrain.comm.flight_recorder import dump_stacks_on, flush_output, print_error
from dtrain.errors import DtrainError, Interrupted

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm

ABORT_DELAY_S = 0.5
"""Seconds that a stopped rank leaves the others to write their records before it aborts the job;
mpirun kills them about a second after its SIGTERM."""


_world: Comm | None = None


_previous_handlers: dict[int, Any] = {}
"""The handlers before those of a rank, by signal."""


def init() -> Comm:
    """Start MPI in this process and return the group of all ranks; later calls return it again.

    Without a launcher this process is the only rank. From then on an uncaught exception ends all
    ranks. Every function that needs MPI calls it; call it first where a site's MPI must
    start before torch.

    Raises
    ------
    ConfigError
        No MPI library can be loaded, or it found another number of ranks than were started.
    """
    global _world
    if _world is None:
        from dtrain.comm import world

        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread:
            dump_stacks_on(signal.SIGUSR1)  # its default action would end a rank that starts
            sys.excepthook = _end_of_script
        _world = world()  # MPI comes before torch
        if in_main_thread:
            _install_signal_handlers(_world)
            os.register_at_fork(after_in_child=_leave_rank)
    return _world


def writes_files() -> bool:
    """Return whether this process writes files that are the same on all ranks: rank 0 does, and a
    process in which `init` was not called."""
    return _world is None or _world.rank == 0


def report_error(error: BaseException, comm: Comm | None) -> int:
    """Print an error once for all ranks; return the exit code, or end the job if this rank alone
    failed."""
    if isinstance(error, DtrainError):
        if error.on_all_ranks and comm is not None and comm.rank:
            return error.code
        print_error(f"dtrain: {error.text_with_key()}")
        if not error.on_all_ranks and comm is not None:
            comm.abort(error.code)
        return error.code
    if isinstance(error, Interrupted):
        if not error.quiet:
            print_error(f"dtrain: {error}")
        if comm is not None:
            if comm.size > 1:
                time.sleep(ABORT_DELAY_S)
            comm.abort(error.code)
        return error.code
    with suppress(OSError, ValueError):
        traceback.print_exception(error)
    if comm is not None:
        comm.abort(1)
    return 1


def _end_of_script(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """End a script after an uncaught exception."""
    code = report_error(error, _world)
    flush_output()
    raise SystemExit(code)


def _install_signal_handlers(comm: Comm) -> None:
    """Write a flight record on SIGUSR1; on SIGINT and SIGTERM write one and raise `Interrupted`.

    The exception unlocks the run folder on its way out.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for signal_number in (signal.SIGINT, signal.SIGTERM):  # launchers send it twice
            signal.signal(signal_number, signal.SIG_IGN)
        interrupted = Interrupted(number, quiet=comm.rank > 0)
        if comm.flight.folder is not None:  # before the exception ends the waits it records
            comm.flight.dump(f"Stopped: {interrupted}", frame)
        raise interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        _previous_handlers[number] = signal.signal(number, stop)
    comm.flight.dump_on_signal(signal.SIGUSR1)


def _leave_rank() -> None:
    """Take the handlers of the rank away from a process that it has forked.

    A pool of processes ends its workers by SIGTERM, which must end neither the job nor with a
    message. SIGUSR1, which asks ranks for their records, is ignored.
    """
    assert _world is not None
    _world.flight.detach()
    if sys.excepthook is _end_of_script:
        sys.excepthook = sys.__excepthook__
    with suppress(ValueError):  # handlers belong to the main thread
        for number, handler in _previous_handlers.items():
            signal.signal(number, handler)
        _previous_handlers.clear()  # its own children keep the handlers that it installs
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
