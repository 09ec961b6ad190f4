"""Checks of the launcher: of this process, on PATH, and what Slurm offers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from dtrain.comm import launch_refusals
from dtrain.comm.launch_refusals import MPICH, mpi_family, pmi_variables
from dtrain.comm.launcher import find_mpirun, missing_mpirun_cause, missing_mpirun_cure
from dtrain.comm.launcher_detection import (
    FIRST_SPECIAL_STEP,
    Launch,
    detect_launcher,
    is_pty_shell,
    launch_text,
    pty_shell_cause,
    pty_shell_cure,
)
from dtrain.doctor.finding import Finding, Severity, finding_of
from dtrain.doctor.programs import program_output


def check_pty_shell(environ: Mapping[str, str], started_by_shell: bool) -> list[Finding]:
    """Return the finding of a shell that `srun --pty` started."""
    launch = detect_launcher(environ)
    if launch is None or not is_pty_shell(launch, started_by_shell):
        return []
    severity: Severity = "problem" if launch.size > 1 else "note"
    cure = pty_shell_cure(environ, launch)
    return [Finding("launch.pty-shell", severity, pty_shell_cause(launch), cure)]


def check_leftovers(environ: Mapping[str, str]) -> list[Finding]:
    """Return the finding of variables of a process manager in a shell that is no rank."""
    names = pmi_variables(environ)
    if not names or detect_launcher(environ) is not None:
        return []
    return [
        Finding(
            "launch.foreign-variables",
            "note",
            f"this shell has {len(names)} variables of a process manager ({names[0]}), and no "
            "launcher started it: an MPI program may take itself for a rank, and wait for ever",
            "open a new shell, or use `dtrain train RUN.toml --ranks N`, which removes them",
        )
    ]


def check_ranks(environ: Mapping[str, str], world_size: int | None, library: str) -> list[Finding]:
    """Return the findings of the launcher that started this rank.

    Parameters
    ----------
    world_size : int or None
        Ranks that the MPI library found; None: it was not started.
    """
    launch = detect_launcher(environ)
    if launch is None:
        return []
    nested = _check_nested(environ, launch)
    if nested or launch.size == 1:
        return nested
    refusal = launch_refusals.wrong_world(environ, launch, world_size, library)
    return [] if refusal is None else [finding_of(refusal)]


def _check_nested(environ: Mapping[str, str], launch: Launch) -> list[Finding]:
    """Return the finding of an mpirun that several tasks of a Slurm step have started."""
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    step = int(environ.get("SLURM_STEP_ID", str(FIRST_SPECIAL_STEP)))
    if launch.launcher == "srun" or launch.rank or tasks < 2 or step >= FIRST_SPECIAL_STEP:
        return []
    return [
        Finding(
            "launch.nested",
            "problem",
            f"srun started {tasks} tasks, and each of them starts {launch.launcher}: "
            f"{launch_text(launch)}, and there are {tasks} such groups of ranks",
            f"use one launcher: `srun --mpi=pmix -n {launch.size} dtrain train RUN.toml`, or "
            f"mpirun in the job script without srun",
        )
    ]


def check_mpirun(environ: Mapping[str, str], library: str) -> list[Finding]:
    """Return the findings of the launchers on PATH, for ranks that nobody has started yet."""
    own = find_mpirun(environ)
    if own is None or shutil.which(own, path=environ.get("PATH")) is None:
        return [
            Finding(
                "launch.no-mpirun",
                "note" if "SLURM_JOB_ID" in environ else "problem",
                f"`--ranks N` needs an mpirun, but {missing_mpirun_cause(own)}",
                missing_mpirun_cure(),
            )
        ]
    family = mpi_family(library)
    if family and _launcher_family(own, environ) not in (family, ""):
        return [
            Finding(
                "launch.wrong-mpirun",
                "problem",
                f"{own} belongs to {_launcher_family(own, environ)}, and the library is {library}: "
                "every rank would find itself as rank 0 of 1",
                "put the mpiexec of the library's module first on PATH, or set DTRAIN_MPIRUN to it",
            )
        ]
    return _check_path(environ, family, own, library)


def _check_path(environ: Mapping[str, str], family: str, own: str, library: str) -> list[Finding]:
    """Return the finding of an mpirun or mpiexec first on PATH that belongs to another MPI."""
    for name in ("mpirun", "mpiexec"):
        path = shutil.which(name, path=environ.get("PATH"))
        if path is None or Path(path).resolve() == Path(own).resolve():
            continue
        other = _launcher_family(path, environ)
        if family and other not in (family, ""):
            return [
                Finding(
                    "launch.foreign-mpirun",
                    "note",
                    f"{path}, the first {name} on PATH, belongs to {other}, and the library is "
                    f"{library}: ranks that it starts find themselves as rank 0 of 1",
                    f"type `{own} -n N dtrain train RUN.toml`, or `dtrain train RUN.toml "
                    "--ranks N`, which uses it",
                )
            ]
    return []


def _launcher_family(path: str, environ: Mapping[str, str]) -> str:
    return mpi_family(program_output([path, "--version"], environ) or "")


def check_slurm(environ: Mapping[str, str], library: str) -> list[Finding]:
    """Return the findings of Slurm's MPI plugins, where Slurm answers."""
    types = program_output(["srun", "--mpi=list"], environ)
    if types is None:
        return []
    in_job = "SLURM_JOB_ID" in environ
    if "pmix" not in types and mpi_family(library) != MPICH:
        return [
            Finding(
                "launch.no-pmix-plugin",
                "problem" if in_job else "note",
                f"srun has no pmix plugin (`srun --mpi=list`: {' '.join(types.split())}), and "
                f"{library or 'Open MPI'} speaks only PMIx",
                "start the ranks with the library's mpirun inside the allocation, or ask for the "
                "pmix plugin of Slurm",
            )
        ]
    if environ.get("SLURM_MPI_TYPE") == "none":
        return [
            Finding(
                "launch.mpi-type-none",
                "note",
                "SLURM_MPI_TYPE is none: srun gives its tasks no process manager by default",
                "type `srun --mpi=pmix`, or `export SLURM_MPI_TYPE=pmix`",
            )
        ]
    return []


def launch_summary(launch: Launch | None) -> str:
    """Return the words about the launcher of this process."""
    if launch is None:
        return "no launcher"
    return f"rank {launch.rank} of {launch.size} of {launch.launcher}"
