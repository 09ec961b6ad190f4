"""Whole commands: the demo, resume, plan, user data; what is imported when."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dtrain.cli import main
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
        ended = dtrain(run, tmp_path / "out", 2, "mesh.stages=2", f"epochs={epochs}")
    assert "resumed   12 of 24 updates were done before" in ended.out
    ended = dtrain(run, tmp_path / "out", 2, "mesh.stages=2", "epochs=2")
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


def test_a_plan_predicts_time_by_a_costs_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "costs.toml").write_text(COSTS)
    words = [sys.executable, "-m", "dtrain", "plan", str(run), "--ranks", "4"]
    words += ["--costs", str(tmp_path / "costs.toml"), "--set", "mesh.stages=2"]
    told = json.loads(start([*words, "--json"], cwd=ROOT).out)
    found = told["prediction"]
    assert found["links"]["intra-node"]["messages"] > 0
    assert found["links"]["inter-node"]["messages"] == 0
    assert 0 < found["bubble"] < 1
    assert found["samples_per_s"] == pytest.approx(found["samples"] / found["makespan_s"])
    # Of a rank, the mean of its gradients crosses between two nodes: 2 (n - 1) / n of the bytes.
    for stage, each in enumerate(found["stages"]):
        rows = [row for row in told["memory"] if row["stage"] == stage]
        assert each["mean_s"] == pytest.approx(
            rows[0]["gradients_bytes"] / 1e8 + 2e-5 * (1 + stage)
        )
    words += ["--set", "mesh.placement=replicas-in-node"]
    shown = start(words, cwd=ROOT)
    assert shown.code == 0, shown.err
    for word in ("Memory of a rank", "live activations", "samples/s", "waiting"):
        assert word in shown.out
    apart = json.loads(start([*words, "--json"], cwd=ROOT).out)["prediction"]
    assert apart["links"]["inter-node"] == found["links"]["intra-node"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("ranks-per-node", "rank-per-node"), "did you mean 'ranks-per-node'"),
        (("layers.fc1", "layers.fc9"), "unknown layer in [layers.*] 'fc9'"),
        (("intra-node", "inner-node"), "unknown table [links.*] 'inner-node'"),
        (
            ("multiply-adds-per-s = 1e9", ""),
            "layer 'heads' has no seconds: give [layers.heads], or mul",
        ),
        (("bytes-per-s = 1e9", "bytes-per-s = 0"), "[links.intra-node] bytes-per-s = 0.0"),
        (("[links.inter-node]", "[layers.head]"), "unknown key [layers.head]"),
    ],
)
def test_a_costs_file_that_does_not_fit_is_refused(
    change: tuple[str, str],
    said: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "costs.toml").write_text(COSTS.replace(*change))
    words = ["plan", str(run), "--ranks", "4", "--set", "mesh.stages=2"]
    words += ["--costs", str(tmp_path / "costs.toml")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "costs.toml: " in told


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
