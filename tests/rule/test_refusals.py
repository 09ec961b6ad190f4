"""Mistakes in run files, meshes and user code: one error and its exit code, in this process.

`dtrain plan` accepts what every rank of `dtrain train` accepts; `tests/system/test_refusals.py`
tries a sample of these with real ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.cli import main
from dtrain.config.parse import read_run
from dtrain.errors import ConfigError
from tests.conftest import ROOT
from tests.refusals import refuses

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

WRONG = [
    (["batch-size=0"], 2, ["batch-size"]),
    (["batchsize=3"], 2, ["batch-size"]),
    (["objective.name=mono-foward"], 2, ["mono-forward"]),
    (["optimizer.name=sdg"], 2, ["'sgd'"]),
    (["optimizer.momentun=0.9"], 2, ["'momentum'"]),
    (["objective.name=backprop", "schedule.name=stream"], 2, ["1f1b", "fill-drain"]),
    (["mesh.stages=3"], 2, ["stages"]),
    (["partition.blocks=1"], 2, ["blocks"]),
    (["partition.blocks=9"], 2, ["blocks"]),
    (['partition.cuts=["fc9"]'], 2, ["fc9", "fc1", "fc2", "head"]),
    (["model.depth=3"], 2, ["depth", "widths"]),
    (["model.widths=[16, 0]"], 2, ["widths"]),
    (["data.name=digit"], 2, ["digits"]),
    (["data.shufle=full"], 2, ["'shuffle'"]),
    (["sync.every=3"], 2, ["[sync]", "'every'"]),
    (["optimizer.weight_decay=0.1"], 2, ["weight-decay"]),
    (["optimizer.lr=-1.0"], 2, ["'sgd'", "-1.0"]),
    (["partition.weights=[1, 2, 3]"], 2, ["weights"]),
]
"""Overrides of the run file, the exit code, and the names that a user needs to mend it."""

USER = [
    ("model", "faults:nothing", 2, ["torch.nn.Module"]),
    ("model", "faults:shared", 2, ["'1.weight'", "'3.weight'"]),
    ("model", "faults:narrow", 2, ["'2'", "(16,)"]),
    ("model", "faults:few_outputs", 2, ["'1'"]),
    ("model", "faults:absent", 2, ["'absent'"]),
    ("model", "nowhere:net", 2, ["'nowhere'"]),
    ("data", "faults:bad_labels", 3, ["-1"]),
]
"""Section, user code, the exit code, and such names."""


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str]:
    """Plan the run file in `folder` on two ranks; return the exit code and the one error."""
    options = [option for override in overrides for option in ("--set", override)]
    code = main(["plan", str(folder / "run.toml"), "--ranks", "2", *options])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("dtrain: ")
    assert printed.err.count("dtrain: ") == 1
    return code, printed.err


@pytest.mark.parametrize(("overrides", "code", "names"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_a_wrong_run_file(
    overrides: list[str],
    code: int,
    names: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    exit_code, message = refused(tmp_path, capsys, *overrides)
    assert exit_code == code, message
    assert all(name in message for name in names), message


@pytest.mark.parametrize(("section", "user_name", "code", "names"), USER, ids=[u[1] for u in USER])
def test_user_code_that_does_not_fit(
    section: str,
    user_name: str,
    code: int,
    names: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "system" / "user")
    text = RUN.replace("digits", user_name)
    if section == "model":
        text = RUN.replace('name = "mlp"\nwidths = [16, 12]', f'name = "{user_name}"')
    (tmp_path / "run.toml").write_text(text)
    exit_code, message = refused(tmp_path, capsys)
    assert exit_code == code, message
    assert all(name in message for name in names), message


NO_STRATEGY = [
    ("objective", "faults:absent", "user-code.no-function"),
    ("objective", "nowhere:Focal", "user-code.no-module"),
    ("objective", "Focal:", "user-code.malformed-name"),
    ("sync", "faults:Raising", "user-code.no-strategy"),
    ("schedule", "faults:nothing", "user-code.no-strategy"),
]


@pytest.mark.parametrize(("section", "name", "key"), NO_STRATEGY)
def test_a_name_of_no_strategy(
    section: str, name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "system" / "user")
    (tmp_path / "run.toml").write_text(f'{RUN}\n[{section}]\nname = "{name}"\n')
    with refuses(ConfigError, key):
        read_run(tmp_path / "run.toml")
