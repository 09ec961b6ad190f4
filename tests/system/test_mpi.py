"""The tests of tests/mpi under one mpirun, and the nodes that MPI finds.

The limit stands outside: a hang may come in finalise, after all tests passed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.need import lack
from tests.process import start

RANKS = 4


def test_suite_passes_under_mpirun(mpirun: str, clean: dict[str, str]) -> None:
    """Groups of 1 to 4 ranks run the contract, see `tests/mpi/conftest.py`."""
    pytest_ = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
    suite = [mpirun, "-n", str(RANKS), *pytest_, "--with-mpi", "tests/mpi"]
    ended = start(suite, limit_s=240, env=clean, cwd=ROOT)
    text = f"{ended.out}\n{ended.err}"
    assert not ended.late, text
    assert ended.code == 0, text
    assert not ended.left, text
    assert ended.out.count(" passed") == RANKS, text


def test_nodes_are_told_apart_by_shared_memory(
    mpirun: str, clean: dict[str, str], tmp_path: Path
) -> None:
    """One node with several host names is one, and two nodes of one host name are two.

    MPICH can take the ranks of one node for those of two.
    """
    script = str(ROOT / "tests/system/scripts/nodes.py")
    if subprocess.run(("unshare", "--uts", "true"), capture_output=True, timeout=60).returncode:
        lack("cluster", "host names cannot be changed here")
    rename = 'hostname "h$OMPI_COMM_WORLD_RANK" && exec "$0" "$1"'
    renamed = ["unshare", "--uts", "sh", "-c", rename, sys.executable, script]
    ended = start([mpirun, "-n", "3", *renamed], limit_s=120, env=clean, cwd=ROOT)
    assert json.loads(ended.out) == [3, [0, 0, 0]], ended.err
    libraries = [*Path("/usr/lib").glob("*/libmpich.so.12")]
    foreign = shutil.which("mpiexec.hydra")
    if foreign is None or not libraries:
        lack("mpich", "no mpiexec and library of MPICH (package mpich)")
    (tmp_path / "libmpi.so.12").symlink_to(libraries[0])
    mpich = {"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so.12"), "LD_LIBRARY_PATH": str(tmp_path)}
    env = clean | mpich | {"MPIR_CVAR_ODD_EVEN_CLIQUES": "1"}
    ended = start([foreign, "-n", "4", sys.executable, script], limit_s=120, env=env, cwd=ROOT)
    assert json.loads(ended.out) == [1, [0, 1, 0, 1]], ended.err
