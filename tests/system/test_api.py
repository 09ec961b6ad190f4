"""Scripts that use the Python API: on any ranks, and how they end when they fail."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from dtrain.errors import NumericalError, RankLostError
from tests.conftest import ROOT
from tests.outcome import summary
from tests.process import Ended, start
from tests.system.on_ranks import read_results, write_commands
from tests.system.programs import DTRAIN

SCRIPTS = ROOT / "tests" / "system" / "scripts"
FOLDERS = {
    "my_model": ("mine",),
    "own_module": ("module",),
    "own_cut": ("cut", "places"),
    "own_strategies": ("strategies",),
    "own_loop": ("by-hand",),
    "callbacks": ("callbacks",),
    "after_training": ("a", "b"),
}
"""The scripts of the contract, by section, and the run folders that they write."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the scripts of the contract."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    return tmp_path / "scripts"


def test_the_scripts_run_on_one_and_four_ranks(
    folder: Path, mpirun: str, clean: dict[str, str]
) -> None:
    """The same metrics on any ranks, the same digest on one replica."""
    folders = [name for names in FOLDERS.values() for name in names]
    digests: dict[str, set[str]] = {name: set() for name in folders}
    for ranks in (1, 4):
        out = folder.parent / f"{ranks}"
        out.mkdir()
        commands = {name: ["run", folder / f"{name}.py"] for name in FOLDERS}
        argv = [mpirun, "-n", f"{ranks}", *write_commands(out, commands)]
        ended = start(argv, env=clean | {"OMP_NUM_THREADS": "1"}, cwd=out, limit_s=240)
        assert ended.code == 0, ended.err
        for results in read_results(out, ranks).values():
            assert [result.code for result in results] == [0] * ranks, results[0].err
        for name in folders:
            ended_run = summary(out / "runs" / name)
            assert (ended_run["status"], ended_run["ranks"]) == ("finished", ranks)
            if ended_run["replicas"] == 1:
                digests[name].add(ended_run["digest"])
        assert summary(out / "runs" / "callbacks")["best"]["metric"] == "accuracy"
        assert (out / "report.html").stat().st_size > 10_000
    assert {name: len(found) for name, found in digests.items()} == dict.fromkeys(folders, 1)


ENDS = {
    "error": ("raise LookupError('mine')", 1),
    "exit": ("sys.exit(0)", RankLostError.code),
    "signal": ("os.kill(os.getpid(), signal.SIGTERM)", 0),
}
"""Statements of one rank in the middle of its session, and the exit code of the job."""


def run_script(folder: Path, text: str, ranks: int, *words: str) -> Ended:
    """Run a script on ranks of this host."""
    (folder / "script.py").write_text(text)
    argv = [*DTRAIN, "run", folder / "script.py", "--ranks", f"{ranks}", *words]
    return start(argv, cwd=folder, env=dict(os.environ), limit_s=120)


@pytest.mark.parametrize("kind", ENDS)
def test_a_rank_that_ends_ends_all(kind: str, folder: Path) -> None:
    statement, code = ENDS[kind]
    script = f"""
import os, signal, sys, time
import dtrain
from my_model import run

with dtrain.Session(run, out="runs/ends") as session:
    for segment in session.segments():
        for update in session.updates(segment):
            if session.rank == 1 and update == 3:
                {statement}
        session.finish(segment)
"""
    ended = run_script(folder, script, 2)
    assert (ended.code, ended.late, ended.left) == (code, False, ()), ended.err
    assert ended.err.count("Traceback") == (kind != "signal"), ended.err
    assert summary(folder / "runs" / "ends")["status"] in ("failed", "stopped")
    assert not (folder / "runs" / "ends" / "owner.json").exists()


def test_an_error_outside_of_a_session_ends_all(
    folder: Path, mpirun: str, clean: dict[str, str]
) -> None:
    """Started by mpirun itself, where only the hook for uncaught exceptions can end the job."""
    script = "import dtrain\nif dtrain.init().rank == 1:\n    raise LookupError\ndtrain.init()"
    (folder / "script.py").write_text(f"{script}.allgather_object(0)  # waits for ever on rank 0\n")
    argv = [mpirun, "-n", "2", sys.executable, folder / "script.py"]
    ended = start(argv, cwd=folder, env=clean, limit_s=60)
    assert (ended.code, ended.late, ended.left) == (1, False, ()), ended.err
    assert ended.err.splitlines().count("LookupError") == 1


def test_a_refusal_is_one_message(folder: Path, mpirun: str, clean: dict[str, str]) -> None:
    """All ranks raise it; the script leaves with the code of the error."""
    text = (folder / "my_model.py").read_text().replace('"adam", lr=1e-3', '"sgd", lr=1e300')
    (folder / "script.py").write_text(text)
    argv = [mpirun, "-n", "2", sys.executable, folder / "script.py"]
    ended = start(argv, cwd=folder, env=clean, limit_s=120)
    assert (ended.code, ended.late, ended.left) == (NumericalError.code, False, ()), ended.err
    assert ended.err.count("dtrain: ") == 1
    assert "Traceback" not in ended.err
    assert summary(folder / "runs" / "mine")["error_key"] == "training.loss-not-finite"


def test_a_script_has_its_arguments(folder: Path) -> None:
    ended = run_script(folder, "import sys\nprint(sys.argv[1:])", 1, "--", "--fast", "x")
    assert ended.code == 0, ended.err
    assert "['--fast', 'x']" in ended.out


def test_importing_dtrain_imports_neither_torch_nor_mpi() -> None:
    program = (
        "import sys, dtrain; dir(dtrain); dtrain.DtrainError\n"
        "assert not {'torch', 'numpy', 'mpi4py', 'h5py'} & set(sys.modules), sorted(sys.modules)"
    )
    ended = start([sys.executable, "-c", program], cwd=ROOT)
    assert ended.code == 0, ended.err
    assert ended.wall_s < 5
