"""Whole commands: the demo, resume, plan, user data; what is imported when."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.outcome import summary
from tests.process import Ended, start

RUN = """
epochs = 1
batch-size = 128
micro-batches = 3
threads = 1
[data]
name = "digits"
[model]
name = "mlp"
widths = [61, 47, 53]
[partition]
blocks = 3
[optimizer]
name = "adam"
lr = 1e-3
"""


def dtrain(run: Path, out: Path, ranks: int, *sets: str, limit_s: float = 120.0) -> Ended:
    """Train on ranks of this host; assert that it went well."""
    words = [sys.executable, "-m", "dtrain", "train", str(run), "--out", str(out)]
    words += ["--ranks", str(ranks), *(word for each in sets for word in ("--set", each))]
    ended = start(words, limit_s=limit_s, cwd=ROOT)
    assert (ended.code, ended.late, ended.left) == (0, False, ()), ended.err
    return ended


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def test_the_same_command_goes_on_where_it_ended(run: Path, tmp_path: Path) -> None:
    for epochs in (1, 2):
        ended = dtrain(run, tmp_path / "out", 4, "mesh.stages=2", f"epochs={epochs}")
    assert "resumed   12 of 24 updates were done before" in ended.out
    ended = dtrain(run, tmp_path / "out", 4, "mesh.stages=2", "epochs=2")
    assert "finished before: 24 updates are done, 24 asked for" in ended.out
    assert summary(tmp_path / "out")["attempts"] == 3


def test_the_demo_is_a_pleasure(tmp_path: Path) -> None:
    """At least 95 % in under a minute, twice in a row; what it says first and last."""
    for out in ("one", "two"):
        ended = dtrain(ROOT / "jobs" / "demo.toml", tmp_path / out, 4, limit_s=60.0)
        told = summary(tmp_path / out)
        assert told["test_accuracy"] >= 0.95
        assert (told["stages"], told["replicas"], told["ranks"]) == (2, 2, 4)
        lines = ended.out.splitlines()
        assert lines[0].startswith("dtrain ")
        for word in ("Python 3.", "torch 2.", "Open MPI" if "Open MPI" in lines[0] else "MPI"):
            assert word in lines[0]
        assert lines[-3].startswith("test accuracy 9")
        assert lines[-2] == f"folder  {tmp_path / out}"
        assert lines[-1].startswith("next    /")
        assert str(ROOT / "jobs" / "demo.toml") in lines[-1]
        assert ended.err == ""
    assert summary(tmp_path / "one")["digest"] == summary(tmp_path / "two")["digest"]


def test_a_plan_needs_no_mpi_and_shows_what_train_does(run: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "dtrain", "plan", str(run), "--ranks", "4"]
    words += ["--set", "mesh.stages=2"]
    shown = start(words, cwd=ROOT)
    assert shown.code == 0, shown.err
    for word in ("2 replicas x 2 stages", "fc1", "multiply-adds", "stage 1 |", "activation"):
        assert word in shown.out
    told = json.loads(start([*words, "--json"], cwd=ROOT).out)
    assert told["place"] == [0, 1, 1]
    assert [block["layers"] for block in told["blocks"]] == [["fc1"], ["fc2"], ["fc3", "head"]]
    dtrain(run, tmp_path / "out", 4, "mesh.stages=2")
    assert (tmp_path / "out" / "plan.txt").read_text() == shown.out


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_mpi(argv: list[str]) -> None:
    code = (
        "import sys; from dtrain.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'mpi4py', 'numpy'} & set(sys.modules)"
    )
    ended = start([sys.executable, "-c", code, *argv], cwd=ROOT)
    assert ended.code == 0, ended.err


def test_ranks_import_mpi_before_torch(clean: dict[str, str], mpirun: str) -> None:
    code = (
        "import sys; from dtrain.comm import world; assert 'torch' not in sys.modules\n"
        "class Watch:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': assert 'mpi4py.MPI' in sys.modules\n"
        "sys.meta_path.insert(0, Watch()); world(); assert 'torch' in sys.modules"
    )
    ended = start([mpirun, "-n", "2", sys.executable, "-c", code], env=clean, cwd=ROOT)
    assert ended.code == 0, ended.err


def test_data_given_by_a_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def data(rows):\n"
        "    x = np.random.default_rng(0).normal(size=(rows, 5)).astype('float32')\n"
        "    y = (x[:, 0] > 0).astype('int64')\n"
        "    return x, y, x, y\n"
    )
    text = RUN.replace('name = "digits"', 'name = "mine:data"\nrows = 256')
    (tmp_path / "run.toml").write_text(text.replace("epochs = 1", "epochs = 60"))
    dtrain(tmp_path / "run.toml", tmp_path / "out", 2)
    assert summary(tmp_path / "out")["test_accuracy"] > 0.9
    assert np.isfinite(summary(tmp_path / "out")["train_loss"])
