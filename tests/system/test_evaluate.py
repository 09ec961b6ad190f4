"""`dtrain evaluate`: ranks of its own, ranks of a launcher, and what it refuses in which words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.digits import HEAD
from tests.outcome import summary
from tests.process import Ended, start

RUN = f"""{HEAD}[partition]
blocks = 3
[mesh]
stages = 2
[optimizer]
name = "adam"
lr = 0.01
"""
PROGRAM = [sys.executable, "-m", "dtrain"]


def evaluate(*words: str | Path) -> Ended:
    """Evaluate, and return how that ended."""
    return start([*PROGRAM, "evaluate", *words], cwd=ROOT)


def refused(ended: Ended, code: int, *words: str) -> None:
    """Assert that one rank spoke once, without a traceback."""
    told = f"{ended.out}\n{ended.err}"
    assert (ended.code, ended.late, ended.left, ended.out) == (code, False, (), ""), told
    assert "Traceback" not in told
    assert told.count("dtrain: ") == 1, told
    for word in words:
        assert word in ended.err, told


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, trained on two ranks from a run file beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "run.toml").write_text(RUN)
    words = ["train", str(folder / "run.toml"), "--ranks", "2", "--out", str(folder / "out")]
    ended = start([*PROGRAM, *words], cwd=ROOT)
    assert ended.code == 0, ended.err
    return folder / "out"


def test_two_ranks_and_one_find_what_the_run_found(out: Path) -> None:
    told = summary(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for more in (["--ranks", "2"], []):
        ended = evaluate(out, "--json", *more)
        assert (ended.code, ended.err) == (0, ""), ended.err
        found = json.loads(ended.out)
        for key in ("loss", "accuracy", "accuracy_vote"):
            assert found[key] == told[f"test_{key}"]
        assert found["accuracy_per_block"] == told["accuracy_per_block"]
        assert found["ranks"] == (2 if more else 1)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_launcher_of_the_users_own(out: Path, clean: dict[str, str], mpirun: str) -> None:
    ended = start([mpirun, "-n", "3", *PROGRAM, "evaluate", out], env=clean, cwd=ROOT)
    assert (ended.code, ended.left) == (0, ()), ended.err
    accuracy = summary(out)["test_accuracy"]
    for words in (f"folder    {out}", "on 3 ranks", f"({round(360 * accuracy)} of 360)"):
        assert ended.out.count(words) == 1, ended.out


def test_refusals_are_told_once(out: Path, tmp_path: Path) -> None:
    absent = evaluate(tmp_path / "absent", "--ranks", "2")
    refused(absent, 2, "there is no run folder", "absent")
    refused(evaluate(tmp_path), 2, "holds no run.toml")
    wrong = evaluate(out, "--ranks", "2", "--set", "model.widths=[3]")
    refused(wrong, 2, "evaluate takes data.*, device and threads")


def test_a_folder_without_a_checkpoint_says_when_there_will_be_one(
    out: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text((out / "run.toml").read_text())
    refused(evaluate(tmp_path), 2, "no complete checkpoint", "end of its first epoch")


def test_a_damaged_checkpoint_names_the_file(out: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text((out / "run.toml").read_text())
    for path in (out / "checkpoints").rglob("*"):
        copy = tmp_path / path.relative_to(out)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            copy.write_bytes(path.read_bytes()[:-1] if path.suffix == ".h5" else path.read_bytes())
    refused(evaluate(tmp_path, "--ranks", "2"), 3, "is damaged", "delete the folder", ".h5")


def test_help_imports_neither_torch_nor_mpi() -> None:
    code = (
        "import sys; from dtrain.cli import main\n"
        "try:\n    main(['evaluate', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'mpi4py', 'numpy'} & set(sys.modules)"
    )
    ended = start([sys.executable, "-c", code], cwd=ROOT)
    assert ended.code == 0, ended.err
