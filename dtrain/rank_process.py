"""The process of one rank: the start of MPI, signals, and an end that no other rank waits for.

Invariant: a rank that fails ends the job, whether the command line or a user's script runs in it.
An error that all ranks raise is printed once. Signals have their handlers here and nowhere else:

    signal                  before training    in training
    SIGUSR1 and 2           is remembered      sets a flag; the run saves and ends with code 75
    SIGTERM                 ends the job       the same
    SIGINT                  ends the job       the same; a second one ends the job
    SIGCONT, then SIGTERM   ends the job       ends the job, under mpirun, which kills it next
    SIGURG                  writes a flight record; without a handler it does nothing

A process that a rank forks is no rank: signals and errors end that process alone, and it writes no
flight record.
"""

from __future__ import annotations

import atexit
import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, final

from dtrain.comm.early_signals import WARNINGS, ignore_warnings, remember, take_remembered
from dtrain.comm.flight_recorder import FLIGHT_SIGNAL, dump_stacks_on, flush_output, print_error
from dtrain.comm.launcher import RELAY_VARIABLE, RELAYED
from dtrain.comm.launcher_detection import MPIRUN, detect_launcher, start_limit_s
from dtrain.comm.rank_marks import IN_START, remove_mark, set_mark
from dtrain.errors import DtrainError, Interrupted, RankLostError

if TYPE_CHECKING:
    from dtrain.comm.communicator import Comm

ABORT_DELAY_S = 0.5
"""Seconds that a stopped rank leaves the others to write their records before it aborts the job;
mpirun kills them about a second after its SIGTERM."""


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


REPEAT_S = 1.0
"""Seconds in which the same wish may come again: launchers send signals twice."""


PARENT_INTERVAL_S = 1.0
"""Seconds between two looks at the process that started a rank."""


ORPHAN_S = 7.0
"""Seconds that a rank may go on after its launcher was killed."""


RECORD_S = 10.0
"""Seconds after a stop signal after which a rank that still runs writes a flight record."""


_world: Comm | None = None


_launcher: int | None = None
"""The process that started this rank; None: no launcher did."""


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
        No MPI library can be loaded, or it found another number of ranks than were started; or
        `DTRAIN_START_TIMEOUT` is no number.
    """
    global _world
    if _world is None:
        from dtrain.comm import world

        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread:
            dump_stacks_on(FLIGHT_SIGNAL)
            for number in WARNINGS:
                _handle(number, _before_training)
            atexit.register(ignore_warnings)
            sys.excepthook = _end_of_script
        with _start_limit():
            _world = world()  # MPI comes before torch
        if in_main_thread:
            _install_signal_handlers(_world)
            os.register_at_fork(after_in_child=_leave_rank)
    return _world


@contextmanager
def _start_limit() -> Iterator[None]:
    """End this process with its stack, and with code 1, if the start of MPI exceeds its limit.

    MPI holds the lock of Python while it starts and waits there for every rank, so no thread of
    Python could do it.
    """
    limit_s, launch = start_limit_s(os.environ), detect_launcher(os.environ)
    rank = 0 if launch is None else launch.rank
    set_mark(IN_START, rank)
    if limit_s and sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        remove_mark(IN_START, rank)


def is_rank_of(comm: Comm) -> bool:
    """Return whether this process is one rank of `comm`; else its ranks are threads."""
    return comm is _world


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
        if error.on_all_ranks:
            _ignore_stop_signals()  # srun ends the others once the first one has left with 75
            return error.code
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


@final
class _StopSignals:
    """What a stop signal does in this process now.

    Attributes
    ----------
    request : callable, optional
        Receives the number of a signal; None: it ends the process.
    numbers : tuple of int
        The signals that `request` receives.
    first : (float, int) or None
        When the first one came, and its number.
    continued_at : float
        When SIGCONT came last.
    """

    def __init__(self) -> None:
        self.request: Callable[[int], None] | None = None
        self.numbers: tuple[int, ...] = ()
        self.first: tuple[float, int] | None = None
        self.continued_at = -math.inf
        launch = detect_launcher(os.environ)
        self._under_mpirun = launch is not None and launch.launcher == MPIRUN
        self._came = threading.Lock()  # free once a signal came
        self._came.acquire()

    def defers(self, number: int) -> bool:
        """Return whether a signal that comes now is left to `request`."""
        if self.request is None or number not in self.numbers:
            return False
        now = time.monotonic()
        if number == signal.SIGTERM and self._under_mpirun and now - self.continued_at < REPEAT_S:
            return False  # SIGCONT and SIGTERM of mpirun: it kills this rank in a moment
        if self.first is None:
            self.first = now, number
            self._came.release()
        elif number == signal.SIGINT and now - self.first[0] > REPEAT_S:
            return False
        self.request(number)
        return True

    def watch(self, comm: Comm) -> None:
        """Write a flight record where a run does not stop for a while; never returns."""
        while self._came.acquire():
            time.sleep(RECORD_S)
            if self.request is not None and self.first is not None:
                name = signal.Signals(self.first[1]).name
                frame = sys._current_frames().get(threading.main_thread().ident or 0)
                comm.flight.dump(f"{name} came {RECORD_S:g} s ago, and the run goes on", frame)


_signals = _StopSignals()


def defer_stop_signals(request: Callable[[int], None], names: Sequence[str]) -> None:
    """Pass the numbers of these signals, and SIGINT, to `request` from now on.

    A second SIGINT ends the process, as it does without a request.
    """
    numbers = (signal.SIGINT, *(signal.Signals[f"SIG{name}"] for name in names))
    _signals.first = None
    _signals.numbers, _signals.request = numbers, request
    for number in take_remembered():
        os.kill(os.getpid(), number)


def _meaning(number: int) -> int:
    """Return the signal that a rank acts on, by the one that it gets."""
    relayed = RELAYED if RELAY_VARIABLE in os.environ else {}
    return relayed.get(signal.Signals(number), number)


def _before_training(number: int, frame: FrameType | None) -> None:
    """Remember a warning; end at what mpirun has passed on for SIGTERM."""
    if _meaning(number) not in WARNINGS:
        os._exit(128 + number)  # by default the launcher would print a banner
    remember(number)


def end_at_signals() -> None:
    """Let signals end the process again."""
    _signals.request = None


def _install_signal_handlers(comm: Comm) -> None:
    """Write a flight record on SIGURG; pass stop signals on, or write one and raise `Interrupted`.

    The exception unlocks the run folder on its way out.
    """

    def stop(received: int, frame: FrameType | None) -> None:
        number = _meaning(received)
        if _signals.defers(number):
            return
        if _signals.request is None and number in WARNINGS:
            remember(received)
            return
        _ignore_stop_signals()  # launchers send it twice
        interrupted = Interrupted.by_signal(number, quiet=comm.rank > 0)
        if comm.flight.folder is not None:  # before the exception ends the waits it records
            comm.flight.dump(f"Stopped: {interrupted}", frame)
        raise interrupted

    def note_continue(number: int, frame: FrameType | None) -> None:
        _signals.continued_at = time.monotonic()

    for number in STOP_SIGNALS:
        _handle(number, stop)
    _handle(signal.SIGCONT, note_continue)
    threading.Thread(target=_signals.watch, args=(comm,), daemon=True, name="dtrain-stop").start()
    if detect_launcher(os.environ) is not None:
        global _launcher
        _launcher = os.getppid()
        words = (comm, _launcher)
        threading.Thread(
            target=_watch_launcher, args=words, daemon=True, name="dtrain-parent"
        ).start()
    comm.flight.dump_on_signal(FLIGHT_SIGNAL)


def launcher_loss() -> RankLostError | None:
    """Return the error of a rank whose launcher was killed, None where it was not.

    Output of such a rank fails, so its first error may be another one.
    """
    if _launcher is None or os.getppid() == _launcher:
        return None
    return RankLostError(
        "launcher.lost",
        "the launcher of the ranks (mpirun or srun) was killed: start the same command again to "
        "resume",
    )


def _watch_launcher(comm: Comm, parent: int) -> None:
    """End this rank when the process that started it is killed; never returns otherwise.

    The rank may save as after SIGTERM, if it is quick: without its launcher it cannot end in order.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_INTERVAL_S)
    with suppress(OSError):  # output goes to the launcher, and would fail
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    if comm.flight.folder is not None:
        comm.flight.dump("The launcher was killed", None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)
    print_error(f"dtrain: rank {comm.rank} ends: its launcher was killed")
    os._exit(RankLostError.code)


def _ignore_stop_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _handle(number: int, handler: Callable[[int, FrameType | None], object]) -> None:
    """Set the handler of a signal; keep the one that it had before `init`."""
    _previous_handlers.setdefault(number, signal.getsignal(number))
    signal.signal(number, handler)


def _leave_rank() -> None:
    """Take the handlers of the rank away from a process that it has forked.

    A pool of processes ends its workers by SIGTERM, which must end neither the job nor with a
    message. Signals that ask ranks for a record or a checkpoint are ignored, since Slurm sends
    them to all processes of a step.
    """
    assert _world is not None
    _world.flight.detach()
    if sys.excepthook is _end_of_script:
        sys.excepthook = sys.__excepthook__
    with suppress(ValueError):  # handlers belong to the main thread
        for number, handler in _previous_handlers.items():
            signal.signal(number, handler)
        _previous_handlers.clear()  # its own children keep the handlers that it installs
        for number in (FLIGHT_SIGNAL, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
