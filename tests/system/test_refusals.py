"""Mistakes in run files, meshes and data: one message, no traceback, the code, nothing left."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.digits import HEAD
from tests.process import Ended, start

RUN = f"""{HEAD}[mesh]
stages = 2
[optimizer]
name = "sgd"
lr = 0.1
"""

# What is set, the exit code, and what the message must say: of what tests/rule/test_refusals.py
# and test_data.py try in one process, one of each place where it is found.
WRONG = [
    (["objective.name=mono-foward"], 2, ["did you mean 'mono-forward'"]),
    (["mesh.stages=3"], 2, ["2 ranks cannot form", "set stages"]),
    (['partition.cuts=["fc9"]'], 2, ["unknown layer 'fc9'", "fc1, fc2, head"]),
]
USER = [
    ("model", "faults:shared", 2, ["same", "'1'", "'3'"]),
    ("data", "faults:bad_labels", 3, ["label -1"]),
    ("data", "faults:infinite", 4, ["loss of block", "| update 0 | action B"]),
]


def dtrain(folder: Path, *words: str, ranks: int = 2, limit_s: float = 60.0) -> Ended:
    """Write the run file into `folder`, train it on ranks of this host, and return its end."""
    path = folder / "run.toml"
    if not path.exists():
        path.write_text(RUN)
    out = ["--out", str(folder / "out")]
    argv = [sys.executable, "-m", "dtrain", "train", str(path), "--ranks", str(ranks), *out]
    return start([*argv, *words], limit_s=limit_s, cwd=ROOT)


def refused(ended: Ended, code: int, words: list[str]) -> None:
    """Assert that a program ended as a refusal does."""
    told = f"{ended.out}\n{ended.err}"
    assert not ended.late, told
    assert ended.code == code, told
    assert ended.left == (), ended.left
    assert "Traceback" not in told
    lines = [line for line in ended.err.splitlines() if line.strip()]
    assert lines[0].startswith("dtrain: "), told
    assert told.count("dtrain: ") == 1, told
    for word in words:
        assert word in ended.err, told


@pytest.mark.parametrize(("changes", "code", "words"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_a_wrong_run_file(changes: list[str], code: int, words: list[str], tmp_path: Path) -> None:
    sets = [word for change in changes for word in ("--set", change)]
    refused(dtrain(tmp_path, *sets), code, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("table", "name", "code", "words"), USER, ids=[u[1] for u in USER])
def test_user_code_that_does_not_fit(
    table: str, name: str, code: int, words: list[str], tmp_path: Path
) -> None:
    source = ROOT / "tests" / "system" / "user" / "faults.py"
    (tmp_path / "faults.py").write_text(source.read_text())
    text = RUN.replace('name = "mlp"\nwidths = [16, 12]', 'name = "NET"')
    text = text.replace("NET", name) if table == "model" else RUN.replace("digits", name)
    (tmp_path / "run.toml").write_text(text)
    refused(dtrain(tmp_path), code, words)


def damaged(folder: Path, kind: str) -> None:
    """Write two HDF5 files of which the training one is wrong in one way."""
    random = np.random.default_rng(0)
    for name in ("good", "bad"):
        x = random.integers(0, 255, (30, 1, 4, 4), dtype=np.uint8)
        y = random.integers(0, 3, 30)
        wrong = name == "bad"
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"] = x
            file["y"] = y + 5 if wrong and kind == "labels" else y
            file.attrs["classes"] = ["a", "b", "c"]
    if kind == "no file":
        (folder / "bad.h5").unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no file", ["bad.h5"]),
        ("labels", ["classes"]),
    ],
)
def test_wrong_data(kind: str, words: list[str], tmp_path: Path) -> None:
    damaged(tmp_path, kind)
    data = 'name = "hdf5"\ntrain = "bad.h5"\ntest = "good.h5"'
    (tmp_path / "run.toml").write_text(RUN.replace('name = "digits"', data))
    refused(dtrain(tmp_path), 3, words)


def test_a_missing_run_file(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "dtrain", "train", str(tmp_path / "none.toml"), "--ranks", "2"]
    refused(start(argv, cwd=ROOT), 2, ["cannot read", "none.toml"])


def test_several_stages_without_ranks_print_the_commands_that_work(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    argv = [sys.executable, "-m", "dtrain", "train", str(tmp_path / "run.toml")]
    refused(start(argv, cwd=tmp_path), 2, ["--ranks 2", "srun --mpi=pmix -n 2"])


def test_ranks_that_refuse_together_speak_once(
    tmp_path: Path, clean: dict[str, str], mpirun: str
) -> None:
    """Under a launcher of the user's own, where no process looked at the run file before."""
    (tmp_path / "run.toml").write_text(RUN)
    argv = [mpirun, "-n", "2", sys.executable, "-m", "dtrain", "train", str(tmp_path / "run.toml")]
    ended = start([*argv, "--set", "partition.blocks=1"], env=clean, cwd=tmp_path)
    assert ended.code == 2
    assert (ended.out + ended.err).count("dtrain: 1 blocks cannot fill 2 stages") == 1
    assert "Traceback" not in ended.err
    assert ended.left == ()


def test_ranks_within_ranks_are_refused(tmp_path: Path, clean: dict[str, str], mpirun: str) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    inner = [sys.executable, "-m", "dtrain", "train", str(tmp_path / "run.toml"), "--ranks", "2"]
    ended = start([mpirun, "-n", "2", *inner], env=clean, cwd=tmp_path)
    assert ended.code == 2
    assert "leave --ranks out" in ended.err
    assert ended.left == ()
