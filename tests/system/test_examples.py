"""The scripts of `examples/` in quick form."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.outcome import summary
from tests.process import start
from tests.system.on_ranks import read_results, write_commands

EXAMPLES = ROOT / "examples"
SCRIPTS = {path.stem: path for path in sorted(EXAMPLES.glob("*.py"))}
LINES = 60
FOLDERS = {
    "daso_nodes": ("daso-3",),
    "fine_tuning": ("fine_tuning/six-digits", "fine_tuning/four-digits"),
    "notebook": ("notebook/local", "notebook/backprop"),
    "pipelined": tuple(
        f"pipelined/{name}" for name in ("1f1b", "pipelined", "pipelined-predicted")
    ),
    "sweep_optuna": (),
    "sweep_propulate": (),
}
"""The run folders of the examples that have not exactly one of their own name."""
SIX = ("own_model", "own_partition", "own_objective", "own_sync", "own_loop", "fine_tuning")
"""Examples that also run on 4 ranks, and without MPI, where two of them check a strategy."""


@pytest.mark.parametrize(("ranks", "names"), [(2, tuple(SCRIPTS)), (4, SIX)])
def test_the_examples_run_under_one_mpirun(
    ranks: int, names: tuple[str, ...], tmp_path: Path, mpirun: str, clean: dict[str, str]
) -> None:
    """All end alike on all ranks, and every run is finished."""
    commands = {name: ["run", SCRIPTS[name], "--", "--quick"] for name in names}
    argv = [mpirun, "-n", f"{ranks}", *write_commands(tmp_path, commands)]
    ended = start(argv, env=clean | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, limit_s=240)
    assert ended.code == 0, ended.err
    for name, results in read_results(tmp_path, ranks).items():
        assert [result.code for result in results] == [0] * ranks, (name, results)
        for folder in FOLDERS.get(name, (name,)):
            ended_run = summary(tmp_path / "runs" / folder)
            assert (ended_run["status"], ended_run["ranks"]) == ("finished", ranks), name
    for package, folder in (("optuna", "sweep"), ("propulate", "propulate")):
        sweeps = [*(tmp_path / "runs" / folder).glob("*/summary.json")]
        assert bool(sweeps) == bool(find_spec(package) and f"sweep_{package}" in names)
    for file in ("report.html", "local.png"):
        assert (tmp_path / "runs" / "notebook" / file).exists() == ("notebook" in names)


def test_examples_run_on_one_rank_and_check_their_strategies(
    tmp_path: Path, clean: dict[str, str]
) -> None:
    words = [["run", str(SCRIPTS[name]), "--", "--quick"] for name in SIX]
    program = f"from dtrain.cli import main\nassert not any([main(argv) for argv in {words}])"
    ended = start(
        [sys.executable, "-c", program], env=clean | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path
    )
    assert ended.code == 0, ended.err
    for name in SIX:
        for folder in FOLDERS.get(name, (name,)):
            assert summary(tmp_path / "runs" / folder)["status"] == "finished"


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_short(name: str) -> None:
    assert len(SCRIPTS[name].read_text(encoding="utf-8").splitlines()) <= LINES


def test_the_table_lists_all_examples() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", text, re.M)) == sorted(SCRIPTS)
