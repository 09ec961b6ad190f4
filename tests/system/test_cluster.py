"""The Slurm harness itself: it starts, repairs, refuses and removes.

Tests that need no cluster stand at both ends, so that few have to start one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import cluster as hosts
from tests.cluster import Cluster, Taken, net
from tests.conftest import ROOT
from tests.process import start
from tests.system.jobs import submit, wait_for_job

# The sleep: in Open MPI 5 a message from a faster rank during MPI_Init may crash a rank (its issue
# 12495).
HELLO = """
import time
from mpi4py import MPI
time.sleep(0.5)
world = MPI.COMM_WORLD
node = world.Split_type(MPI.COMM_TYPE_SHARED)
print(world.rank, world.size, node.size, MPI.Get_processor_name())
"""


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, timeout=30)


def names(cluster: Cluster) -> list[str]:
    ended = start(["srun", "-N4", "-n4", "hostname"], limit_s=60, env=cluster.env)
    assert ended.code == 0, ended.err
    return sorted(ended.out.split())


@pytest.fixture
def absent(turn: None) -> None:
    """No cluster: the test needs its names free."""
    hosts.down()


@pytest.fixture
def bridge(absent: None) -> Iterator[str]:
    """A foreign bridge with the name of the cluster's."""
    ip("link", "add", net.BRIDGE, "type", "bridge")
    yield net.BRIDGE
    ip("link", "del", net.BRIDGE)


@pytest.fixture
def namespace(absent: None) -> Iterator[str]:
    """A foreign namespace with the name of a host's."""
    ip("netns", "add", net.space(3))
    yield net.space(3)
    ip("netns", "del", net.space(3))


@pytest.fixture
def route(absent: None) -> Iterator[str]:
    """A foreign network in the cluster's subnet."""
    ip("link", "add", "other0", "type", "bridge")
    ip("addr", "add", "10.77.0.129/25", "dev", "other0")
    ip("link", "set", "other0", "up")
    yield "10.77.0.128/25"
    ip("link", "del", "other0")


def test_up_repairs_what_an_interrupted_up_left(
    absent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "down", lambda: None)  # a killed process does not clean up
        patch.setattr(hosts.slurm, "settle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hosts.up(2)
    assert len(net.spaces()) == 2
    assert names(hosts.up(4)) == ["n1", "n2", "n3", "n4"]


def test_mpi_sees_one_world_on_four_hosts(cluster: Cluster) -> None:
    command = ["srun", "--mpi=pmix", "-N4", "-n4", sys.executable, "-c", HELLO]
    ended = start(command, limit_s=90, env=cluster.env)
    assert ended.code == 0, ended.err
    rows = sorted(line.split() for line in ended.out.splitlines())
    assert [row[:3] for row in rows] == [[str(rank), "4", "1"] for rank in range(4)]
    assert sorted(row[3] for row in rows) == ["n1", "n2", "n3", "n4"]


def test_up_again_is_the_same_cluster(cluster: Cluster) -> None:
    before = sorted(hosts.daemons())
    assert hosts.up(4) == cluster
    assert sorted(hosts.daemons()) == before
    assert len(net.spaces()) == 4


def test_links_are_shaped(cluster: Cluster) -> None:
    hosts.up(4, rate="1gbit")
    assert "rate 1Gbit" in net.call("tc", "-n", net.space(4), "qdisc", "show", "dev", "eth0")
    hosts.up(4)
    assert "tbf" not in net.call("tc", "-n", net.space(4), "qdisc", "show", "dev", "eth0")


def test_users_take_turns(turn: None) -> None:
    other = [sys.executable, "-m", "tests.cluster", "down"]
    ended = start(other, limit_s=30, cwd=ROOT)
    assert ended.code == 1
    assert str(os.getpid()) in ended.err


def test_env_is_for_a_shell(cluster: Cluster) -> None:
    ended = start([sys.executable, "-m", "tests.cluster", "env"], limit_s=30, cwd=ROOT)
    assert ended.out == f"export SLURM_CONF={hosts.FOLDER / 'slurm.conf'}\n"
    assert Path(cluster.env["SLURM_CONF"]).exists()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A stand-in for dtrain that prints its host, threads and arguments; it fails for bad.toml."""
    path = tmp_path / "dtrain"
    path.write_text('#!/bin/sh\necho "$(hostname) $OMP_NUM_THREADS $*"\n[ "$2" != bad.toml ]\n')
    path.chmod(0o755)
    return path


def test_the_job_script_runs_ranks_and_returns_their_code(
    cluster: Cluster, program: Path, tmp_path: Path
) -> None:
    options = ["--nodes=4", "--ntasks=4", "--cpus-per-task=2"]
    env = cluster.env | {"DTRAIN": str(program)}
    good, bad = (
        submit([*options, f"--output={name}.log"], [f"{name}.toml", "--out", "a b"], env, tmp_path)
        for name in ("good", "bad")
    )
    assert wait_for_job(good, env) == ("COMPLETED", 0)
    rows = [row for row in (tmp_path / "good.log").read_text().splitlines() if row[0] == "n"]
    assert sorted(rows) == [f"n{host} 2 train good.toml --out a b" for host in range(1, 5)]
    # With --kill-on-bad-exit the first rank that leaves has the others ended by SIGTERM, and Slurm
    # returns the largest code of all.
    state, code = wait_for_job(bad, env)
    assert state == "FAILED"
    assert code in (1, 128 + signal.SIGTERM)


@pytest.mark.parametrize("daemon", ["slurmctld", "slurmd.n2", "munged"])
def test_up_replaces_a_daemon_that_died(cluster: Cluster, daemon: str) -> None:
    pid = int((hosts.FOLDER / "run" / f"{daemon}.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    while hosts.command(pid):
        time.sleep(0.01)
    assert names(hosts.up(4)) == ["n1", "n2", "n3", "n4"]


def test_down_leaves_nothing_and_may_be_repeated(cluster: Cluster) -> None:
    sleeper = ["srun", "-N4", "-n4", "sleep", "1000"]
    job = subprocess.Popen(sleeper, env=cluster.env, stderr=subprocess.DEVNULL)
    try:
        while len(net.pids()) < 3 * 4:  # slurmd, slurmstepd and sleep on each host
            time.sleep(0.05)
        pids = hosts.daemons() + net.pids()
        hosts.down()
    finally:
        job.kill()
        job.wait()
    assert not [hosts.command(pid) for pid in pids if hosts.command(pid)]
    assert net.taken() == []
    assert not hosts.FOLDER.exists()
    assert not hosts.STATE.exists()
    hosts.down()


@pytest.mark.parametrize("kind", ["bridge", "namespace", "route"])
def test_foreign_objects_are_refused_and_stay(kind: str, request: pytest.FixtureRequest) -> None:
    name = request.getfixturevalue(kind)
    with pytest.raises(Taken, match=name):
        hosts.up(4)
    hosts.down()
    assert any(name in other for other in net.taken())
    assert hosts.state() is None


def test_a_foreign_folder_is_refused_and_stays(absent: None) -> None:
    hosts.FOLDER.mkdir()
    try:
        with pytest.raises(Taken, match=str(hosts.FOLDER)):
            hosts.up(4)
        assert hosts.FOLDER.exists()
    finally:
        hosts.FOLDER.rmdir()
