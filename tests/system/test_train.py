"""Whole commands: the demo, resume, plan, user data; which modules are imported when."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from dtrain.errors import ConfigError
from tests.conftest import ROOT
from tests.need import lack
from tests.outcome import summary
from tests.process import start
from tests.system.conftest import Shared
from tests.system.on_ranks import STACK
from tests.system.programs import RUN, run_in_process, train, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_the_same_command_resumes_and_a_finished_run_trains_no_more(
    shared: Shared, tmp_path: Path
) -> None:
    run, out = shared.folder / "run.toml", tmp_path / "out"
    shutil.copytree(shared.folder / "out", out)
    train(run, out, 2, "epochs=2")
    assert (summary(out)["updates"], summary(out)["attempts"]) == (24, 2)
    for folder in (out, tmp_path / "straight"):
        sets = ["--set", "epochs=2", "--set", "mesh.stages=1"]
        assert run_in_process("train", run, "--out", folder, *sets) == 0
    assert (summary(out)["updates"], summary(out)["attempts"]) == (24, 3)
    assert summary(out)["digest"] == summary(tmp_path / "straight")["digest"]


def test_the_demo_trains_in_under_a_minute(tmp_path: Path) -> None:
    """At least 95 %; a minute of processor time, since other programs may share the machine."""
    before = os.times()
    ended = train(ROOT / "jobs" / "demo.toml", tmp_path / "out", 4, limit_s=240.0)
    after = os.times()
    used_s = after.children_user + after.children_system
    assert used_s - before.children_user - before.children_system < 60
    result = summary(tmp_path / "out")
    assert result["test_accuracy"] >= 0.95
    assert (result["stages"], result["replicas"], result["ranks"]) == (2, 2, 4)
    lines = ended.out.splitlines()
    assert lines[0].startswith("started ")
    for word in ("Python 3.", "torch 2.", "Open MPI" if "Open MPI" in lines[1] else "MPI"):
        assert word in lines[1]
    assert f"{result['test_accuracy']:.1%}".replace("%", " %") in lines[-3]
    assert str(tmp_path / "out") in lines[-2]
    assert str(ROOT / "jobs" / "demo.toml") in lines[-1]
    assert ended.err == ""


def test_a_plan_shows_what_train_does(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(shared.folder / "run.toml"), "--ranks", "2"]
    assert run_in_process(*words) == 0
    assert capsys.readouterr().out == (shared.folder / "out" / "plan.txt").read_text()
    assert run_in_process(*words, "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert table["place"] == [0, 1, 1]
    assert [block["layers"] for block in table["blocks"]] == [["fc1"], ["fc2"], ["fc3", "head"]]


def test_fresh_starts_fill_in_keys_and_the_best_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The options of the commands, on ranks that `--ranks` starts and in this process."""
    run, out = write_run(tmp_path), tmp_path / "run-0"
    words = ["--set", "checkpoint.best=accuracy", "--set", "ema.decay=0.9", "--set", "epochs=1"]
    template = tmp_path / "{name}-{seed}"
    argv = ["train", str(run), "--fresh", "--out", str(template), *words]
    assert run_in_process(*argv, "--set", "mesh.stages=1") == 0
    assert summary(out)["ranks"] == 1
    ended = start([sys.executable, "-m", "dtrain", *argv, "--ranks", "2"], cwd=ROOT)
    assert ended.code == 0, ended.err
    assert (summary(out)["ranks"], summary(out)["attempts"]) == (2, 1)
    assert summary(tmp_path / "run-0.old-1")["ranks"] == 1
    capsys.readouterr()
    assert run_in_process("evaluate", out, "--best", "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == summary(out)["best"]["value"]
    assert run_in_process("export", out, tmp_path / "ema.pt", "--ema", "--best") == 0
    assert run_in_process("train", run, "--out", tmp_path / "{sead}") == ConfigError.code


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
    assert run_in_process(*words, "--json") == 0
    table = json.loads(capsys.readouterr().out)
    prediction = table["prediction"]
    assert prediction["links"]["intra-node"]["messages"] > 0
    assert prediction["links"]["inter-node"]["messages"] == 0
    assert 0 < prediction["bubble"] < 1
    rate = prediction["samples"] / prediction["makespan_s"]
    assert prediction["samples_per_s"] == pytest.approx(rate)
    # The mean of a rank's gradients crosses between two nodes: 2 (n - 1) / n of the bytes.
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
    words = ["plan", str(run), "--ranks", "4"]
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


def test_ranks_import_mpi_before_torch_and_answer_a_signal_in_between(shared: Shared) -> None:
    """Until there is a world and a run folder, SIGURG prints stacks and ends nothing."""
    assert shared.ended.err.count(STACK) == 2
    assert [result.code for result in shared.results["train"]] == [0, 0]
    assert summary(shared.folder / "out")["status"] == "finished"


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
    words = ["train", run, "--out", tmp_path / "out", "--set", "mesh.stages=1"]
    assert run_in_process(*words) == 0
    assert summary(tmp_path / "out")["test_accuracy"] > 0.9
    assert np.isfinite(summary(tmp_path / "out")["train_loss"])


def test_cifar10_is_imported_and_trained(data_dir: Path, tmp_path: Path) -> None:
    """The test images of the real archive, 10,000 JPEG files, in both splits."""
    source = data_dir / "cifar10-jpeg.tar.gz"
    if not source.exists():
        lack("data", f"no {source}")
    images = tmp_path / "cifar10.h5"
    assert run_in_process("data", "import", source, images, "--split", "test") == 0
    text = RUN.replace('"blobs:blobs"', '"hdf5"\ntrain = "cifar10.h5"\ntest = "cifar10.h5"')
    run = write_run(tmp_path, text.replace("epochs = 1", "updates = 4"))
    words = ["train", run, "--out", tmp_path / "out", "--set", "mesh.stages=1"]
    assert run_in_process(*words) == 0
    result = summary(tmp_path / "out")
    assert (result["status"], result["updates"]) == ("finished", 4)
    assert 0 < result["test_accuracy"] < 1
