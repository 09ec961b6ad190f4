"""Tools for tests that start whole programs.

`cluster`
    A Slurm cluster of four hosts, n1 to n4, that works and is idle::

        def test_names(cluster):
            ended = start(["srun", "-N4", "-n4", "hostname"], env=cluster.env)

    The first test that requests it starts it; later requests repair it, which takes a tenth of a
    second where nothing is broken; the end of the session removes it.
`clean`
    An environment without the variables of any MPI launcher or Slurm, in which root may start
    Open MPI and ranks may outnumber cores.
`mpirun`
    The launcher that belongs to the MPI which this Python loads; use it with `clean`.
`shared`
    Commands on two ranks that share one start: a training of `shared.folder/run.toml` into
    `shared.folder/out`, which tests only read, an evaluation of it, and refusals.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import cluster as hosts
from tests.conftest import ROOT
from tests.need import lack
from tests.process import Ended, start
from tests.system.on_ranks import Result, read_results, write_commands
from tests.system.programs import RUN, write_run

REFUSED_CHANGES = {
    "run file": "objective.name=mono-foward",
    "mesh": "partition.blocks=1",
    "plan": 'partition.cuts=["fc9"]',
    "data": "data.name=faults:bad_labels",
}
"""Changes of the shared run that all ranks refuse, by the place where they do."""

LAUNCHERS = ("OMPI_", "PMI", "PRTE_", "SLURM_", "MPI_LOCAL", "HYDRA_", "MPIR_")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of the cluster: one process at a time may use it."""
    if "turn" in getattr(item, "fixturenames", ()) or item.path.stem == "test_cluster":
        item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session", autouse=True)
def cached_bytecode() -> Iterator[None]:
    """Let programs write bytecode: otherwise every rank compiles dtrain again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(scope="session")
def turn() -> Iterator[None]:
    """Reserve the machine's cluster for this session."""
    try:
        hosts.check()
    except hosts.Lacking as why:
        lack("cluster", str(why))
    with hosts.hold(wait_s=300.0):
        yield
        hosts.down()


@pytest.fixture
def cluster(turn: None) -> hosts.Cluster:
    """Four idle Slurm hosts."""
    try:
        return hosts.up(4)
    except hosts.Lacking as why:
        lack("cluster", str(why))


@pytest.fixture(scope="session")
def clean(cached_bytecode: None) -> dict[str, str]:
    """An environment in which an mpirun of this machine starts ranks undisturbed."""
    user = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Open MPI 5 reads PRTE_*, Open MPI 4 the two rmaps and hwloc ones; others read none of them.
    crowd = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    return user | root | crowd


@pytest.fixture(scope="session")
def mpirun() -> str:
    """The path of the launcher that belongs to the MPI which this Python loads."""
    wheel = Path(sys.executable).with_name("mpirun")
    path = str(wheel) if wheel.exists() else None
    path = path or os.environ.get("DTRAIN_MPIRUN") or shutil.which("mpiexec")
    return path or lack("mpi", "no mpirun beside this Python and no mpiexec on PATH")


@dataclass(frozen=True)
class Shared:
    """The run folder, and how the program ended that ran all commands on two ranks."""

    folder: Path
    ended: Ended
    results: dict[str, list[Result]]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, clean: dict[str, str], mpirun: str) -> Shared:
    """Run a training and commands on its folder under one mpirun."""
    folder = tmp_path_factory.mktemp("shared")
    run, out = write_run(folder, RUN, "faults"), folder / "out"
    commands: dict[str, list[str | Path]] = {
        "train": ["train", run, "--out", out],
        "evaluate": ["evaluate", out, "--json"],
        "evaluate: key": ["evaluate", out, "--set", "model.widths=[3]"],
        "nested": ["train", run, "--out", folder / "none", "--ranks", "2"],
    }
    for name, change in REFUSED_CHANGES.items():
        commands[name] = ["train", run, "--out", folder / "none", "--set", change]
    argv = write_commands(folder, commands)
    ended = start([mpirun, "-n", "2", *argv], env=clean, cwd=ROOT)
    assert (ended.code, ended.late, ended.left) == (0, False, ()), ended.err
    return Shared(folder, ended, read_results(folder, 2))
