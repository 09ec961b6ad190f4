"""What tests that start whole programs may use.

`cluster`
    A Slurm cluster of four hosts, n1 to n4, that works and is idle::

        def test_names(cluster):
            ended = start(["srun", "-N4", "-n4", "hostname"], env=cluster.env)

    It is started for the first test that asks, mended for each test that asks later (which costs
    a tenth of a second where nothing was broken), and removed at the end of the session.
`clean`
    An environment without the variables of any MPI launcher or Slurm, in which root may start
    Open MPI and ranks may outnumber cores.
`mpirun`
    The launcher that belongs to the MPI which this Python loads; use it with `clean`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import cluster as hosts
from tests.need import lack

LAUNCHERS = ("OMPI_", "PMI", "PRTE_", "SLURM_", "MPI_LOCAL", "HYDRA_", "MPIR_")


@pytest.fixture(scope="session")
def turn() -> Iterator[None]:
    """Have the machine's cluster to this session, once a test asks for it."""
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


@pytest.fixture
def clean() -> dict[str, str]:
    """An environment in which an mpirun of this machine starts ranks undisturbed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Open MPI 5 reads PRTE_*, Open MPI 4 the two rmaps and hwloc ones; others read none of them.
    crowd = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    return kept | root | crowd


@pytest.fixture(scope="session")
def mpirun() -> str:
    """The path of the launcher that belongs to the MPI which this Python loads."""
    wheel = Path(sys.executable).with_name("mpirun")
    found = str(wheel) if wheel.exists() else None
    path = found or os.environ.get("DTRAIN_MPIRUN") or shutil.which("mpiexec")
    return path or lack("mpi", "no mpirun beside this Python and no mpiexec on PATH")
