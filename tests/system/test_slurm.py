"""Runs on four Slurm hosts, and the worlds of one rank that Slurm or another mpirun may make."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from dtrain.data.import_images import import_images
from tests.cluster import Cluster
from tests.conftest import ROOT
from tests.hang import place
from tests.need import lack
from tests.outcome import summary
from tests.process import start, sweep

RUN = """
updates = 4
batch-size = 128
threads = 1
[data]
name = "hdf5"
train = "cifar10.h5"
test = "cifar10-test.h5"
[model]
name = "mlp"
widths = [1000, 1000, 1000]
[mesh]
stages = 2
[partition]
blocks = 3
[optimizer]
name = "adam"
lr = 1e-3
"""
DIGITS = RUN.replace("1000, 1000, 1000", "32, 16").replace('"hdf5"', '"digits"')
DIGITS = "\n".join(line for line in DIGITS.splitlines() if "cifar10" not in line)


@pytest.fixture(scope="module")
def cifar(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CIFAR-10, imported, and a run file."""
    source = data_dir / "cifar10-jpeg.tar.gz"
    if not source.exists():
        lack("data", f"no {source}")
    folder = tmp_path_factory.mktemp("cifar")
    began = time.monotonic()
    files = import_images(source, folder / "cifar10.h5", None)
    assert [path.name for path in files] == ["cifar10.h5", "cifar10-test.h5"]
    assert time.monotonic() - began < 120
    (folder / "run.toml").write_text(RUN)
    return folder


def test_four_hosts_train_as_one_host_does(cluster: Cluster, cifar: Path) -> None:
    """2 stages x 2 replicas under srun; the same bits as four ranks of this host."""
    words = [sys.executable, "-m", "dtrain", "train", str(cifar / "run.toml"), "--out"]
    srun = ["srun", "--mpi=pmix", "-N4", "-n4"]
    ended = start([*srun, *words, str(cifar / "far")], env=cluster.env, limit_s=180, cwd=ROOT)
    assert ended.code == 0, ended.err
    assert "4 = 2 replicas x 2 stages on 4 hosts" in ended.out
    near = start([*words, str(cifar / "near"), "--ranks", "4"], limit_s=180, cwd=ROOT)
    assert near.code == 0, near.err
    here, there = summary(cifar / "near"), summary(cifar / "far")
    assert here["digest"] == there["digest"]
    assert here["bytes_inter_node"] == there["bytes_intra_node"] == 0
    assert here["bytes_intra_node"] == there["bytes_inter_node"] > 4 * 5e6 * 4 * 2
    assert there["status"] == "finished"


def finished(job: str, environ: dict[str, str], limit_s: float = 120.0) -> str:
    """Return the state in which a job ended; `sbatch --wait` would look every 40 s only."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        told = start(["squeue", "--noheader", "--states=all", "-o%T", f"-j{job}"], env=environ)
        if told.out.strip() not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
            return told.out.strip()
        time.sleep(0.5)
    return "LATE"


def test_the_job_script_runs_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(DIGITS)
    script = ROOT / "jobs" / "slurm.sh"
    options = ["--parsable", "--nodes=2", "--ntasks=4", f"--chdir={tmp_path}"]
    options += [f"--output={tmp_path}/job.log"]
    environ = cluster.env | {"DTRAIN": str(Path(sys.executable).with_name("dtrain"))}
    for updates in (4, 6):
        words = ["sbatch", *options, str(script), "run.toml", "--set", f"updates={updates}"]
        job = start(words, env=environ, cwd=tmp_path).out.strip()
        assert finished(job, environ) == "COMPLETED", (tmp_path / "job.log").read_text()
    log = (tmp_path / "job.log").read_text()
    assert "Sorry" not in log
    assert "4 = 2 replicas x 2 stages on 2 hosts" in log
    assert "resumed   4 of 6 updates were done before" in log
    assert summary(tmp_path / "runs" / "run")["updates"] == 6


@pytest.fixture
def hung(cluster: Cluster, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Three stages on three hosts, under srun; the middle one hangs, all others wait by now."""
    words = ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", "-N3", "-n3", sys.executable, "-m"]
    words += ["dtrain", "train", str(place(tmp_path)), "--out", str(tmp_path / "out")]
    mark = f"DTRAIN_MARK={os.getpid()}slurm"
    environ = cluster.env | dict([mark.split("=")])
    child = subprocess.Popen(words, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        came((tmp_path / "hung",))
        time.sleep(1)
        yield child
    finally:
        sweep(mark)
        child.wait()


def came(paths: Iterable[Path], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while missing := [path.name for path in paths if not path.exists()]:
        assert time.monotonic() < deadline, f"{missing} never came"
        time.sleep(0.05)


def signalled(name: str, cluster: Cluster, out: Path) -> None:
    """Send a signal to all ranks of the one job, as its user does: the outer ones say that they
    wait, the middle one that it does not."""
    job = start(["squeue", "--noheader", "-o%i"], env=cluster.env).out.strip()
    ended = start(["scancel", f"--signal={name}", job], env=cluster.env)
    assert ended.code == 0, ended.err
    paths = [out / "flight" / f"rank-{rank:05d}.txt" for rank in range(3)]
    came(paths, 20.0)
    first, middle, last = (path.read_text() for path in paths)
    assert "waits for " in first
    assert "waits for " in last
    assert "is in no wait" in middle


def test_ranks_under_srun_report_their_waits_and_end_when_cancelled(
    cluster: Cluster, hung: subprocess.Popen[str], tmp_path: Path
) -> None:
    signalled("USR1", cluster, tmp_path / "out")
    words = [sys.executable, "-m", "dtrain", "flight", str(tmp_path / "out")]
    report = start(words, env=cluster.env, cwd=ROOT)
    assert report.code == 0, report.err
    assert "rank 1 on n" in report.out
    for record in (tmp_path / "out" / "flight").glob("rank-*.txt"):
        record.unlink()
    signalled("TERM", cluster, tmp_path / "out")
    _, err = hung.communicate(timeout=30)
    assert hung.returncode != 0
    assert err.count("dtrain: ") == 1
    assert "SIGTERM" in err
    assert "Traceback" not in err
    assert summary(tmp_path / "out")["status"] == "stopped"
    assert not (tmp_path / "out" / "owner.json").exists()


def test_srun_without_pmi_is_refused_with_what_to_type(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(DIGITS)
    words = [sys.executable, "-m", "dtrain", "train", str(tmp_path / "run.toml"), "--out"]
    srun = ["srun", "--mpi=none", "-n2", *words, str(tmp_path / "out")]
    ended = start(srun, env=cluster.env, limit_s=60, cwd=ROOT)
    assert ended.code == 2, ended.err
    told = [line for line in ended.err.splitlines() if line.startswith("dtrain: ")]
    assert len(told) == 1, ended.err
    for word in (
        "srun started 2 ranks",
        "a world of 1 rank",
        "srun --mpi=pmix -n 2",
        "DTRAIN_PMI=pmix",
        "Open MPI",
    ):
        assert word in told[0]
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_a_foreign_mpirun_is_refused_with_what_to_type(
    tmp_path: Path, clean: dict[str, str]
) -> None:
    foreign = shutil.which("mpiexec.hydra") or shutil.which("mpirun.mpich")
    if foreign is None:
        lack("mpich", "no mpiexec of MPICH (package mpich)")
    (tmp_path / "run.toml").write_text(DIGITS)
    words = [sys.executable, "-m", "dtrain", "train", str(tmp_path / "run.toml"), "--out"]
    words += [str(tmp_path / "out")]
    ended = start([foreign, "-n", "2", *words], env=clean, limit_s=60, cwd=ROOT)
    assert ended.code == 2, ended.err
    told = [line for line in ended.err.splitlines() if line.startswith("dtrain: ")]
    assert len(told) == 1, ended.err
    for word in ("MPICH family started 2 ranks", "a world of 1 rank", "mpirun -n 2", "--ranks 2"):
        assert word in told[0]
    assert "Traceback" not in ended.err
    assert ended.left == ()
    assert not (tmp_path / "out").exists()


def test_a_refusal_under_srun_is_said_once(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(DIGITS)
    words = [sys.executable, "-m", "dtrain", "train", str(tmp_path / "run.toml")]
    srun = ["srun", "--mpi=pmix", "-n4", *words, "--set", "mesh.stages=3"]
    ended = start(srun, env=cluster.env, limit_s=60, cwd=tmp_path)
    assert ended.code == 2, ended.err
    assert ended.err.count("4 ranks cannot form") == 1
    assert "Traceback" not in ended.err
