"""Detect the launcher that started this process, and this process among its ranks.

Invariant: standard library only. Neither MPI nor torch is imported here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from dtrain.errors import ConfigError

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Lowest number of the steps that Slurm makes itself (batch script, `salloc` shell, extern)."""


START_VARIABLE, START_S = "DTRAIN_START_TIMEOUT", 1800.0
"""Variable with the seconds in which MPI must have started on all ranks, and its default."""


@final
@dataclass(frozen=True)
class Launch:
    """The launcher of this process, and this process among its ranks.

    Attributes
    ----------
    launcher : str
        Name for people.
    size, rank : int
        Number of ranks that it started, and the rank of this process.
    local_size : int or None
        Number of ranks on this host; None: unknown.
    """

    launcher: str
    size: int
    rank: int
    local_size: int | None


MPIRUN = "Open MPI's mpirun"


LAUNCHERS = (
    # name, then the variables with size, rank, ranks on this host; the innermost launcher first
    (
        MPIRUN,
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("an mpiexec of the MPICH family", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", ""),
)


def detect_launcher(environ: Mapping[str, str]) -> Launch | None:
    """Return the launcher of this process; None: it was started as a single process.

    The variables of a Slurm job (`SLURM_NTASKS`) are no sign of a rank: a batch script has them
    too.
    """
    step = int(environ.get("SLURM_STEP_ID", "0"))
    for name, size, rank, local in LAUNCHERS:
        if (
            size not in environ
            or rank not in environ
            or (name == "srun" and step >= FIRST_SPECIAL_STEP)
        ):
            continue
        local_size = environ.get(local, "")
        return Launch(
            "srun" if size == "PMI_SIZE" and _is_srun_pmi2(environ) else name,
            int(environ[size]),
            int(environ[rank]),
            int(local_size) if local_size else None,
        )
    return None


def start_limit_s(environ: Mapping[str, str]) -> float:
    """Return the seconds in which MPI must have started on all ranks; 0: there is no limit.

    Raises
    ------
    ConfigError
        The variable is no number of seconds.
    """
    text = environ.get(START_VARIABLE, "")
    try:
        limit_s = float(text) if text else START_S
    except ValueError:
        limit_s = math.nan
    if not 0 <= limit_s < math.inf:
        raise ConfigError(
            "launch.start-limit",
            f"{START_VARIABLE} = {text} must be a number of seconds, at least 0 (0: no limit)",
        )
    return limit_s


def job_name(environ: Mapping[str, str]) -> str:
    """Return a name that all ranks of this start have, and no other start of them; fit for files.

    It needs no message: launchers give their ranks such a name.
    """
    names = ("PMIX_NAMESPACE", "PMI_JOBID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    text = "-".join(environ[name] for name in names if name in environ) or str(os.getpid())
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in text)


def _is_srun_pmi2(environ: Mapping[str, str]) -> bool:
    """Return whether `srun --mpi=pmi2` has set the PMI variables."""
    step = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    return environ.get("PMI_JOBID") == step


def is_started_by_shell() -> bool:
    """Return whether an interactive shell started this process.

    Such a shell gives each command a process group of its own, in the session of its terminal. A
    task of Slurm is in the group that leads its session.
    """
    try:
        with open("/dev/tty", "rb"):
            return os.getpgrp() != os.getsid(0)
    except OSError:
        return False


def is_pty_shell(launch: Launch | None, started_by_shell: bool) -> bool:
    """Return whether the ranks of `launch` are shells, which `srun --pty` started."""
    return launch is not None and launch.launcher == "srun" and started_by_shell


def pty_shell_cause(launch: Launch) -> str:
    """Return the sentence about a shell of `srun --pty`."""
    return (
        f"this shell is task {launch.rank} of {launch.size} of an `srun --pty` step, and the other "
        "tasks are shells, not ranks"
    )


def pty_shell_cure(environ: Mapping[str, str], launch: Launch) -> str:
    """Return the commands that work in a shell of `srun --pty`."""
    tasks = environ.get("SLURM_NTASKS", str(launch.size))
    return (
        f"type `srun --overlap --mpi=pmix -n {tasks} dtrain train RUN.toml`, or on this host "
        f"`dtrain train RUN.toml --ranks {tasks}`; next time open the shell with "
        f"`salloc -n {tasks}`"
    )


def launch_text(launch: Launch) -> str:
    """Return the sentence that says which rank this process is."""
    return f"this is already rank {launch.rank} of {launch.size} that {launch.launcher} started"
