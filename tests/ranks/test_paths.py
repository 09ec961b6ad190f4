"""Paths with variables and `~`, and a run that resumes from staged data, as users do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.cli import main
from dtrain.config.parse import read_run
from dtrain.errors import ConfigError
from dtrain.schema import dump_toml
from tests import tiny
from tests.harness import assert_close_model, train_in_threads
from tests.outcome import summary
from tests.refusals import refuses

KEYS: dict[str, Any] = {
    "data": {"name": "npz", "train": "${STAGE}/tr*.npz", "test": ["$STAGE/test.npz"]},
    "model": {"name": "mlp", "widths": [13, 11], "weights": "~/first.pt"},
    "mesh": {"stages": 1},
    "partition": {"blocks": 2},
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write data into folders a, b (the same) and c (another test split), and a run file."""
    x, y, x_test, y_test = tiny.samples()
    for name in "abc":
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "train.npz", x=x, y=y)
        np.savez(tmp_path / name / "test.npz", x=x_test + (name == "c"), y=y_test)
    (tmp_path / "run.toml").write_text(dump_toml(tiny.TABLE | KEYS))
    for name, value in {"HOME": "home", "WORK": "", "STAGE": "a"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    return tmp_path


def test_a_run_resumes_from_staged_data_with_another_interval_and_mesh(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every path of run file and command line has a variable or `~`."""
    (files / "home").mkdir()
    first = ["train", "$WORK/run.toml", "--out", "~/first-{seed}", "--set", "epochs=1"]
    plain = tiny.TABLE | KEYS | {"model": {"name": "mlp", "widths": [13, 11]}}
    (files / "run.toml").write_text(dump_toml(plain))
    assert main(first) == 0
    assert main(["export", "~/first-3", "$HOME/first.pt"]) == 0
    (files / "run.toml").write_text(dump_toml(tiny.TABLE | KEYS))
    run = "$WORK/run.toml", "--set", "epochs=1"
    assert main(["train", *run, "--out", "$WORK/whole", "--set", "epochs=2"]) == 0
    assert main(["train", *run, "--out", "$WORK/half"]) == 0
    assert main(["train", *run, "--out", "$WORK/other", "--resume", "~/../half"]) == 0
    assert summary(files / "other")["updates"] == 4
    monkeypatch.setenv("STAGE", str(files / "c"))
    moved = read_run(files / "run.toml", ["checkpoint.every=3", "mesh.stages=2"])
    with refuses(ConfigError, "resume.data-changed") as caught:
        train_in_threads(moved, files / "half", 2, 3)
    assert "test split" in caught.value.message
    monkeypatch.setenv("STAGE", str(files / "b"))
    assert train_in_threads(moved, files / "half", 2, 3)["updates"] == 8
    assert_close_model(files / "whole", files / "half")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["plan", "$NOWHERE/run.toml", "--ranks", "1"], "path.variable-unset"),
        (["report", "$WORK/a", "${NOWHERE}/b"], "path.variable-unset"),
        (["train", "$WORK/run.toml", "--resume", "$NOWHERE"], "path.variable-unset"),
        (["submit", "$WORK/run.toml", "--site", "~/$NOWHERE.toml"], "path.variable-unset"),
        (["submit", "$WORK/run.toml", "--environment", "$NOWHERE.tar"], "path.variable-unset"),
        (["plan", "$WORK/run.toml", "--ranks", "1", "--set", "data.test=$NOWHERE/x.npz"],
         "data.variable-unset"),
        (["plan", "$WORK/run.toml", "--ranks", "1", "--set", "model.weights=$NOWHERE/x.pt"],
         "path.variable-unset"),
    ],
)  # fmt: skip
def test_an_unset_variable_is_refused(
    words: list[str], key: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == ConfigError.code
    message = capsys.readouterr().err
    assert key in message
    assert "NOWHERE" in message


@pytest.mark.parametrize("objective", ["backprop", "cafo"])
def test_the_interval_stays_where_segments_are_part_of_training(
    objective: str, tmp_path: Path
) -> None:
    """Delayed gradients are drained, and heads solved, at the end of a segment."""
    changes: dict[str, Any] = {"objective__name": objective, "micro_batches": 1}
    if objective == "backprop":
        changes["schedule__name"] = "pipelined"
    train_in_threads(tiny.run(**changes, epochs=1), tmp_path)
    with refuses(ConfigError, "resume.settings-changed"):
        train_in_threads(tiny.run(**changes, checkpoint__every=2), tmp_path)
