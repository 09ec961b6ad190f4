"""`--ranks`: output and exit code of ranks that mpirun started; signals end all ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dtrain.errors import DtrainError, HangError, RankLostError
from tests.process import Ended, start, sweep
from tests.system.programs import wait_until_gone

STARTER = """
import os, sys
from dtrain.comm.launcher import start_ranks
sys.exit(start_ranks(int(sys.argv[1]), [sys.executable, *sys.argv[2:]], os.environ))
"""

# Without torch, which takes every rank a second to import.
WORKER = """
import os, sys, time
from dtrain.comm.rank_marks import IN_SESSION, set_mark
if sys.argv[1] == "late":  # MPI starts without a rank
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        time.sleep(60)
    from dtrain.rank_process import init
    init()
from mpi4py import MPI
comm, mode = MPI.COMM_WORLD, sys.argv[1]
comm.barrier()
if mode in ("exit", "mpirun") and comm.rank == 1:
    set_mark(IN_SESSION, comm.rank)
    os._exit(3) if mode == "exit" else os.kill(os.getppid(), 9)
if mode == "abort" and comm.rank == 1:
    print("rank 1 aborts", file=sys.stderr, flush=True)
    comm.Abort(4)
if mode == "wait" and comm.rank == 0:
    print("waiting", flush=True)
if mode in ("abort", "wait", "exit", "mpirun"):
    time.sleep(60)
print("rank", comm.rank, "of", comm.size)
sys.exit(int(mode))
"""


def ranks(folder: Path, count: int, mode: str, environ: Mapping[str, str]) -> Ended:
    """Start ranks from a separate process and return how it ended."""
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    return start([sys.executable, "-c", STARTER, str(count), worker, mode], env=environ)


@pytest.fixture
def root(clean: dict[str, str], mpirun: str) -> dict[str, str]:
    """An environment that finds dtrain in this folder and does nothing else for MPI."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.getenv("PYTHONPATH")]))}
    return {n: v for n, v in clean.items() if not n.startswith(("OMPI_", "PRTE_"))} | path


def test_the_exit_code_of_the_ranks_is_returned(tmp_path: Path, root: dict[str, str]) -> None:
    """The messages of the launcher are dropped."""
    ended = ranks(tmp_path, 3, "3", root)
    assert (ended.code, ended.err, ended.left) == (3, "", ())


def test_an_abort_ends_all_with_its_code(tmp_path: Path, root: dict[str, str]) -> None:
    ended = ranks(tmp_path, 3, "abort", root)
    assert (ended.code, ended.err) == (4, "rank 1 aborts\n")
    assert not ended.left


@pytest.mark.parametrize(
    ("mode", "error", "key"),
    [
        ("exit", RankLostError, "rank.exited"),
        ("mpirun", RankLostError, "launcher.killed"),
        ("late", HangError, "hang.start"),
    ],
)
def test_an_end_that_no_rank_reports_is_named(
    mode: str, error: type[DtrainError], key: str, tmp_path: Path, root: dict[str, str]
) -> None:
    """A rank leaves its session by `os._exit`, mpirun is killed, or a rank never starts MPI."""
    ended = ranks(tmp_path, 3, mode, root | {"DTRAIN_START_TIMEOUT": "2" if mode == "late" else ""})
    assert (ended.code, ended.late) == (error.code, False)
    assert not ended.left or mode == "mpirun"  # these ranks do not look for their launcher
    (line,) = (line for line in ended.err.splitlines() if line.startswith("dtrain: "))
    assert f"[{key}]" in line
    assert "exit code 3" in line or mode != "exit"


def test_the_session_folder_of_a_killed_launcher_hinders_no_start(
    tmp_path: Path, root: dict[str, str], mpirun: str
) -> None:
    """Open MPI names the folder by its process id, which the system gives out again."""
    again = tmp_path / "mpirun"
    again.write_text(f"""#!/bin/sh
mkdir "$TMPDIR/ompi.$$"
touch "$TMPDIR/ompi.$$/pmix.$(hostname).tool" "$TMPDIR/ompi.$$/pmix.$(hostname).tool.$$"
exec {mpirun} "$@"
""")
    again.chmod(0o755)
    environ = root | {"TMPDIR": str(tmp_path), "DTRAIN_MPIRUN": str(again)}
    ended = ranks(tmp_path, 2, "0", environ)
    assert (ended.code, ended.err) == (0, "")


def test_ranks_start_inside_a_job_step(tmp_path: Path, root: dict[str, str]) -> None:
    """An interactive shell on a compute node is a step of one rank; its variables are removed."""
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOBID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_NODELIST": "nowhere",
        "PMI_RANK": "0",
        "PMI_SIZE": "1",
    }
    ended = ranks(tmp_path, 3, "0", root | step)
    assert (ended.code, ended.err, ended.left) == (0, "", ())
    assert sorted(ended.out.splitlines()) == [f"rank {rank} of 3" for rank in range(3)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks(
    number: signal.Signals, tmp_path: Path, root: dict[str, str]
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    mark = f"DTRAIN_MARK={tmp_path}"
    child = subprocess.Popen(
        [sys.executable, "-c", STARTER, "3", worker, "wait"],
        env=root | {"DTRAIN_MARK": str(tmp_path)},
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"waiting\n"
        child.send_signal(number)
        assert child.wait(timeout=10) == 128 + number
        wait_until_gone(mark, 5)
    finally:
        sweep(mark)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
