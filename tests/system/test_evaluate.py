"""`dtrain evaluate`: ranks of its own, ranks of a launcher, and the errors of a damaged folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dtrain.errors import CheckpointError, ConfigError
from tests.conftest import ROOT
from tests.outcome import summary
from tests.process import Ended, start
from tests.system.programs import DTRAIN, assert_one_error, run_in_process, train, write_run

RUN = """
epochs = 1
threads = 1
[data]
name = "blobs:blobs"
[model]
name = "mlp"
widths = [16, 12]
[partition]
blocks = 3
[mesh]
stages = 2
[optimizer]
name = "adam"
lr = 0.01
"""


def evaluate(*words: str | Path) -> Ended:
    """Run `dtrain evaluate`."""
    return start([*DTRAIN, "evaluate", *words], cwd=ROOT)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on two ranks."""
    folder = tmp_path_factory.mktemp("evaluate")
    train(write_run(folder, RUN), folder / "out", 2)
    return folder / "out"


def copy_run(out: Path, folder: Path) -> Path:
    """Copy the run file of a finished run into a folder that has nothing else of it."""
    (folder / "run.toml").write_text((out / "run.toml").read_text())
    return folder


def test_any_number_of_ranks_finds_the_metrics_of_the_run(
    out: Path, clean: dict[str, str], mpirun: str
) -> None:
    """One rank, two of its own, three of a launcher of the user's."""
    run = summary(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    launcher = [mpirun, "-n", "3", *DTRAIN, "evaluate", out, "--json"]
    results = {
        1: evaluate(out, "--json"),
        2: evaluate(out, "--json", "--ranks", "2"),
        3: start(launcher, env=clean, cwd=ROOT),
    }
    for ranks, ended in results.items():
        assert (ended.code, ended.left) == (0, ()), ended.err
        metrics = json.loads(ended.out)
        for key in ("loss", "accuracy", "accuracy_vote"):
            assert metrics[key] == run[f"test_{key}"]
        assert metrics["accuracy_per_block"] == run["accuracy_per_block"]
        assert metrics["ranks"] == ranks
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_text_names_folder_and_counts(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("evaluate", out) == 0
    text = capsys.readouterr().out
    assert str(out) in text
    assert f"({round(360 * summary(out)['test_accuracy'])} of 360)" in text


@pytest.mark.parametrize("folder", ["absent", "empty", "no checkpoint"])
def test_a_folder_without_a_run_is_refused(
    folder: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if folder == "no checkpoint":
        copy_run(out, tmp_path)
    path = tmp_path / "absent" if folder == "absent" else tmp_path
    assert run_in_process("evaluate", str(path)) == ConfigError.code
    assert str(path) in capsys.readouterr().err


def test_ranks_that_refuse_print_one_error(out: Path) -> None:
    ended = evaluate(out, "--ranks", "2", "--set", "model.widths=[3]")
    assert_one_error(ended, ConfigError.code)


def test_a_damaged_checkpoint_is_named(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_run(out, tmp_path)
    for path in (out / "checkpoints").rglob("*"):
        copy = tmp_path / path.relative_to(out)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            copy.write_bytes(path.read_bytes()[:-1] if path.suffix == ".h5" else path.read_bytes())
    assert run_in_process("evaluate", str(tmp_path)) == CheckpointError.code
    text = capsys.readouterr().err
    assert text.count("dtrain: ") == 1
    assert ".h5" in text


def test_help_imports_neither_torch_nor_mpi() -> None:
    code = (
        "import sys; from dtrain.cli import main\n"
        "try:\n    main(['evaluate', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'mpi4py', 'numpy'} & set(sys.modules)"
    )
    ended = start([sys.executable, "-c", code], cwd=ROOT)
    assert ended.code == 0, ended.err
