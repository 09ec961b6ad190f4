"""`dtrain evaluate`: with `--ranks`, under a launcher, and the errors of a damaged folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dtrain.errors import CheckpointError, ConfigError
from tests.conftest import ROOT
from tests.outcome import summary
from tests.process import start
from tests.system.conftest import Shared
from tests.system.programs import DTRAIN, run_in_process


@pytest.fixture
def out(shared: Shared) -> Path:
    """The folder of a finished run on two ranks."""
    return shared.folder / "out"


def copy_run(out: Path, folder: Path) -> Path:
    """Copy the run file of a finished run into a folder that has nothing else of it."""
    (folder / "run.toml").write_text((out / "run.toml").read_text())
    return folder


def test_any_number_of_ranks_gives_the_metrics_of_the_run(
    out: Path, shared: Shared, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank, two under the user's launcher, three by `--ranks`; rank 0 prints."""
    run = summary(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run_in_process("evaluate", out, "--json") == 0
    texts = {1: capsys.readouterr().out}
    assert [result.code for result in shared.results["evaluate"]] == [0, 0]
    texts[2], silent = (result.out for result in shared.results["evaluate"])
    assert silent == ""
    ended = start([*DTRAIN, "evaluate", out, "--json", "--ranks", "3"], cwd=ROOT)
    assert (ended.code, ended.left) == (0, ()), ended.err
    texts[3] = ended.out
    for ranks, text in texts.items():
        metrics = json.loads(text)
        for key in ("loss", "accuracy", "accuracy_vote"):
            assert metrics[key] == run[f"test_{key}"]
        assert metrics["accuracy_per_block"] == run["accuracy_per_block"]
        assert metrics["ranks"] == ranks
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_text_names_folder_and_counts(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("evaluate", out) == 0
    text = capsys.readouterr().out
    assert str(out) in text
    assert str(round(360 * summary(out)["test_accuracy"])) in text


@pytest.mark.parametrize("folder", ["absent", "empty", "no checkpoint"])
def test_a_folder_without_a_run_is_refused(
    folder: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if folder == "no checkpoint":
        copy_run(out, tmp_path)
    path = tmp_path / "absent" if folder == "absent" else tmp_path
    assert run_in_process("evaluate", str(path)) == ConfigError.code
    assert str(path) in capsys.readouterr().err


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
