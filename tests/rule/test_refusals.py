"""Mistakes in run files, meshes and user code: the words and the code, all in one process.

`dtrain plan` decides as every rank of `dtrain train` does; `tests/system/test_refusals.py` tries a
sample of these with real ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.cli import main
from tests.conftest import ROOT

RUN = """
epochs = 1
[data]
name = "digits"
[model]
name = "mlp"
widths = [16, 12]
[mesh]
stages = 2
[optimizer]
name = "sgd"
lr = 0.1
"""

# What is set, the exit code, and what the message must say.
WRONG = [
    (["batch-size=0"], 2, ["batch-size = 0", "at least 1"]),
    (["batchsize=3"], 2, ["batchsize", "did you mean 'batch-size'"]),
    (["objective.name=mono-foward"], 2, ["did you mean 'mono-forward'"]),
    (["optimizer.name=sdg"], 2, ["did you mean 'sgd'"]),
    (["optimizer.momentun=0.9"], 2, ["'momentun'", "did you mean 'momentum'"]),
    (["objective.name=backprop", "schedule.name=stream"], 2, ["1f1b", "fill-drain"]),
    (["mesh.stages=3"], 2, ["2 ranks cannot form", "set stages"]),
    (["partition.blocks=1"], 2, ["1 blocks cannot fill 2 stages"]),
    (["partition.blocks=9"], 2, ["9 blocks cannot be cut from 3 layers"]),
    (['partition.cuts=["fc9"]'], 2, ["unknown layer 'fc9'", "fc1, fc2, head"]),
    (["model.depth=3"], 2, ["'depth'", "widths"]),
    (["model.widths=[16, 0]"], 2, ["widths", "whole numbers"]),
    (["data.name=digit"], 2, ["did you mean 'digits'"]),
    (["data.shufle=full"], 2, ["'shufle'", "did you mean 'shuffle'"]),
    (["sync.every=3"], 2, ["'every'", "legal are none"]),
    (["optimizer.weight_decay=0.1"], 2, ["written with hyphens", "weight-decay"]),
    (["optimizer.lr=-1.0"], 2, ["'sgd'", "-1.0"]),
    (["partition.weights=[1, 2, 3]"], 2, ["3 weights for 2 blocks"]),
]
USER = [
    ("model", "faults:nothing", 2, ["is int", "nn.Sequential"]),
    ("model", "faults:shared", 2, ["same", "'1'", "'3'"]),
    ("model", "faults:narrow", 2, ["'2'", "(16,)"]),
    ("model", "faults:few_outputs", 2, ["10 classes", "'1'"]),
    ("model", "faults:absent", 2, ["has no function called 'absent'"]),
    ("model", "nowhere:net", 2, ["no module 'nowhere'"]),
    ("data", "faults:bad_labels", 3, ["label -1"]),
]


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *sets: str) -> tuple[int, str]:
    """Plan the run file in `folder` on two ranks; return the code and what was said."""
    words = [word for each in sets for word in ("--set", each)]
    code = main(["plan", str(folder / "run.toml"), "--ranks", "2", *words])
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("dtrain: ")
    assert told.err.count("dtrain: ") == 1
    return code, told.err


@pytest.mark.parametrize(("changes", "code", "words"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_a_wrong_run_file(
    changes: list[str],
    code: int,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    found, told = refused(tmp_path, capsys, *changes)
    assert found == code, told
    for word in words:
        assert word in told


@pytest.mark.parametrize(("table", "name", "code", "words"), USER, ids=[u[1] for u in USER])
def test_user_code_that_does_not_fit(
    table: str,
    name: str,
    code: int,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "system" / "user")
    text = RUN.replace('name = "mlp"\nwidths = [16, 12]', 'name = "NET"')
    text = text.replace("NET", name) if table == "model" else RUN.replace("digits", name)
    (tmp_path / "run.toml").write_text(text)
    found, told = refused(tmp_path, capsys)
    assert found == code, told
    for word in words:
        assert word in told
