"""Whole commands: the demo, resume, plan, user data; which modules are imported when."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dtrain.errors import ConfigError
from tests.conftest import ROOT
from tests.outcome import summary
from tests.process import start
from tests.system.programs import RUN, run_in_process, train, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_the_same_command_resumes_and_says_when_there_is_nothing_to_do(
    run: Path, tmp_path: Path
) -> None:
    for epochs in (1, 2, 2):
        train(run, tmp_path / "out", 2, "mesh.stages=2", f"epochs={epochs}")
        assert summary(tmp_path / "out")["updates"] == 12 * epochs
    train(run, tmp_path / "straight", 1, "epochs=2")
    assert summary(tmp_path / "out")["attempts"] == 3
    assert summary(tmp_path / "out")["digest"] == summary(tmp_path / "straight")["digest"]


def test_the_demo_is_a_pleasure(tmp_path: Path) -> None:
    """At least 95 % in under a minute; the first and the last lines of what it prints."""
    ended = train(ROOT / "jobs" / "demo.toml", tmp_path / "out", 4, limit_s=60.0)
    result = summary(tmp_path / "out")
    assert result["test_accuracy"] >= 0.95
    assert (result["stages"], result["replicas"], result["ranks"]) == (2, 2, 4)
    lines = ended.out.splitlines()
    assert lines[0].startswith("dtrain ")
    for word in ("Python 3.", "torch 2.", "Open MPI" if "Open MPI" in lines[0] else "MPI"):
        assert word in lines[0]
    assert f"{result['test_accuracy']:.1%}".replace("%", " %") in lines[-3]
    assert str(tmp_path / "out") in lines[-2]
    assert str(ROOT / "jobs" / "demo.toml") in lines[-1]
    assert ended.err == ""


def test_a_plan_needs_no_mpi_and_shows_what_train_does(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [sys.executable, "-m", "dtrain", "plan", str(run), "--ranks", "4"]
    words += ["--set", "mesh.stages=2"]
    plan = start(words, cwd=ROOT)
    assert plan.code == 0, plan.err
    assert run_in_process(*words[3:], "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert table["place"] == [0, 1, 1]
    assert [block["layers"] for block in table["blocks"]] == [["fc1"], ["fc2"], ["fc3", "head"]]
    train(run, tmp_path / "out", 4, "mesh.stages=2")
    assert (tmp_path / "out" / "plan.txt").read_text() == plan.out


COSTS = """
multiply-adds-per-s = 1e9
ranks-per-node = 2
update-s = 0.001
[layers.fc1]
forward-s = 1e-5
backward-s = 2e-5
[links.intra-node]
bytes-per-s = 1e9
[links.inter-node]
bytes-per-s = 1e8
latency-s = 1e-5
"""


def test_a_plan_predicts_time_by_a_costs_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "costs.toml").write_text(COSTS)
    words = ["plan", str(run), "--ranks", "4", "--costs", str(tmp_path / "costs.toml")]
    words += ["--set", "mesh.stages=2"]
    assert run_in_process(*words, "--json") == 0
    table = json.loads(capsys.readouterr().out)
    prediction = table["prediction"]
    assert prediction["links"]["intra-node"]["messages"] > 0
    assert prediction["links"]["inter-node"]["messages"] == 0
    assert 0 < prediction["bubble"] < 1
    rate = prediction["samples"] / prediction["makespan_s"]
    assert prediction["samples_per_s"] == pytest.approx(rate)
    # Of a rank, the mean of its gradients crosses between two nodes: 2 (n - 1) / n of the bytes.
    for stage, times in enumerate(prediction["stages"]):
        rows = [row for row in table["memory"] if row["stage"] == stage]
        mean_s = rows[0]["gradients_bytes"] / 1e8 + 2e-5 * (1 + stage)
        assert times["mean_s"] == pytest.approx(mean_s)
    words += ["--set", "mesh.placement=replicas-in-node"]
    assert run_in_process(*words) == 0
    assert "samples/s" in capsys.readouterr().out
    assert run_in_process(*words, "--json") == 0
    other = json.loads(capsys.readouterr().out)["prediction"]
    assert other["links"]["inter-node"] == prediction["links"]["intra-node"]


@pytest.mark.parametrize(
    "change",
    [
        ("ranks-per-node", "rank-per-node"),
        ("layers.fc1", "layers.fc9"),
        ("intra-node", "inner-node"),
        ("multiply-adds-per-s = 1e9", ""),
        ("bytes-per-s = 1e9", "bytes-per-s = 0"),
        ("[links.inter-node]", "[layers.head]"),
    ],
)
def test_a_costs_file_that_does_not_fit_is_refused(
    change: tuple[str, str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "costs.toml").write_text(COSTS.replace(*change))
    words = ["plan", str(run), "--ranks", "4", "--set", "mesh.stages=2"]
    assert run_in_process(*words, "--costs", tmp_path / "costs.toml") == ConfigError.code
    assert str(tmp_path / "costs.toml") in capsys.readouterr().err


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
    text = RUN.replace('name = "blobs:blobs"', 'name = "mine:data"\nrows = 256')
    run = write_run(tmp_path, text.replace("epochs = 1", "epochs = 60"))
    assert run_in_process("train", run, "--out", tmp_path / "out") == 0
    assert summary(tmp_path / "out")["test_accuracy"] > 0.9
    assert np.isfinite(summary(tmp_path / "out")["train_loss"])
