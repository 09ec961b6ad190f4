"""Runs on four Slurm hosts, and the worlds of one rank that Slurm or another mpirun may make."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.config.parse import read_run
from dtrain.errors import ConfigError
from tests.cluster import Cluster
from tests.conftest import ROOT
from tests.hang import wait_for, write_hanging_run
from tests.harness import train_in_threads
from tests.need import lack
from tests.outcome import summary
from tests.process import Ended, start, sweep
from tests.system.on_ranks import read_results, write_commands
from tests.system.programs import DTRAIN, RUN, write_run
from tests.system.test_api import FOLDERS, SCRIPTS
from tests.system.test_examples import EXAMPLES

WIDE = RUN.replace("epochs = 1", "updates = 4").replace("[61, 47, 53]", "[1000, 1000, 1000]")
SMALL = RUN.replace("epochs = 1", "updates = 4")


def test_four_hosts_train_as_one_host_does(cluster: Cluster, tmp_path: Path) -> None:
    """2 stages x 2 replicas under srun; the same bits as four threads. A refusal comes once.

    Scripts that use the Python API run, too: those of the contract, and an example of DASO.
    """
    run = write_run(tmp_path, WIDE)
    train = ["train", run, "--out", tmp_path / "far"]
    commands = {"refused": [*train, "--set", "mesh.stages=3"], "train": train}
    commands |= {name: ["run", SCRIPTS / f"{name}.py"] for name in FOLDERS}
    commands["example"] = ["run", EXAMPLES / "daso_nodes.py", "--", "--quick"]
    srun = ["srun", "--mpi=pmix", "-N4", "-n4", *write_commands(tmp_path, commands)]
    ended = start(srun, env=cluster.env, limit_s=280, cwd=tmp_path)
    assert ended.code == 0, ended.err
    results = read_results(tmp_path, 4)
    for name, folders in {**FOLDERS, "example": ("daso-3",)}.items():
        assert [result.code for result in results[name]] == [0] * 4, results[name]
        for folder in folders:
            assert summary(tmp_path / "runs" / folder)["status"] == "finished"
    assert [result.code for result in results["refused"]] == [ConfigError.code] * 4
    assert [result.err.count("dtrain: ") for result in results["refused"]] == [1, 0, 0, 0]
    assert [result.code for result in results["train"]] == [0] * 4
    here = train_in_threads(read_run(run, []), tmp_path / "near", stages=2, replicas=2)
    there = summary(tmp_path / "far")
    assert (there["stages"], there["replicas"], there["status"]) == (2, 2, "finished")
    assert here["digest"] == there["digest"]
    assert here["bytes_inter_node"] == there["bytes_intra_node"] == 0
    assert here["bytes_intra_node"] == there["bytes_inter_node"] > 4 * 2e6 * 4 * 2


@pytest.fixture
def hung(cluster: Cluster, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Three stages on three hosts, under srun; the middle one hangs and the others wait."""
    run = write_hanging_run(tmp_path, ["last"])
    words = ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", "-N3", "-n3", *DTRAIN, "train"]
    words += [str(run), "--out", str(tmp_path / "out")]
    mark = f"DTRAIN_MARK={os.getpid()}slurm"
    environ = cluster.env | dict([mark.split("=")])
    child = subprocess.Popen(words, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / "last")
        time.sleep(1)
        yield child
    finally:
        sweep(mark)
        child.wait()


def send_signal(name: str, cluster: Cluster, out: Path) -> None:
    """Send a signal to all ranks of the only job, as its user does; check their records."""
    job = start(["squeue", "--noheader", "-o%i"], env=cluster.env).out.strip()
    ended = start(["scancel", f"--signal={name}", job], env=cluster.env)
    assert ended.code == 0, ended.err
    paths = [out / "flight" / f"rank-{rank:05d}.txt" for rank in range(3)]
    wait_for(*paths)
    waits = ["waits for " in path.read_text() for path in paths]
    assert waits == [True, False, True]


def test_ranks_under_srun_report_their_waits_and_end_when_cancelled(
    cluster: Cluster, hung: subprocess.Popen[str], tmp_path: Path
) -> None:
    send_signal("URG", cluster, tmp_path / "out")
    report = start([*DTRAIN, "flight", tmp_path / "out"], env=cluster.env, cwd=ROOT)
    assert report.code == 0, report.err
    assert "rank 1 on n" in report.out
    for record in (tmp_path / "out" / "flight").glob("rank-*.txt"):
        record.unlink()
    send_signal("TERM", cluster, tmp_path / "out")  # it cannot stop, so it leaves records
    send_signal("INT", cluster, tmp_path / "out")
    _, err = hung.communicate(timeout=30)
    assert hung.returncode != 0
    assert err.count("dtrain: ") == 1
    assert "SIGINT" in err
    assert "Traceback" not in err
    assert summary(tmp_path / "out")["status"] == "stopped"
    assert not (tmp_path / "out" / "owner.json").exists()


def assert_refused_with_commands(ended: Ended, out: Path, *commands: str) -> None:
    """Assert that one rank printed one message, in one line, that contains all commands."""
    assert (ended.code, ended.left) == (ConfigError.code, ()), ended.err
    (message,) = (line for line in ended.err.splitlines() if line.startswith("dtrain: "))
    assert [command for command in commands if command not in message] == []
    assert "Traceback" not in ended.err
    assert not out.exists()


def test_srun_without_pmi_is_refused_with_what_to_type(cluster: Cluster, tmp_path: Path) -> None:
    run, out = write_run(tmp_path, SMALL), tmp_path / "out"
    srun = ["srun", "--mpi=none", "-n2", *DTRAIN, "train", run, "--out", out]
    ended = start(srun, env=cluster.env, limit_s=60, cwd=ROOT)
    assert_refused_with_commands(ended, out, "srun --mpi=pmix -n 2", "DTRAIN_PMI=pmix")


def test_a_foreign_mpirun_is_refused_with_what_to_type(
    tmp_path: Path, clean: dict[str, str]
) -> None:
    foreign = shutil.which("mpiexec.hydra") or shutil.which("mpirun.mpich")
    if foreign is None:
        lack("mpich", "no mpiexec of MPICH (package mpich)")
    run, out = write_run(tmp_path, SMALL), tmp_path / "out"
    words = [foreign, "-n", "2", *DTRAIN, "train", run, "--out", out]
    ended = start(words, env=clean, limit_s=60, cwd=ROOT)
    assert_refused_with_commands(ended, out, "mpirun -n 2", "--ranks 2")
