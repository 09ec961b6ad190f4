"""Mistakes in run files, meshes and data, on real ranks: one message, no traceback, the exit code.

`tests/rule` has each mistake in one process; here is one of each place where ranks find it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.errors import ConfigError, DataError, NumericalError
from tests.conftest import ROOT
from tests.process import start
from tests.system.programs import DTRAIN, assert_one_error, run_in_process, train_command, write_run

RUN = """
epochs = 1
threads = 1
[data]
name = "blobs:blobs"
[model]
name = "mlp"
widths = [16, 12]
[mesh]
stages = 2
[optimizer]
name = "sgd"
lr = 0.1
"""


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("objective.name=mono-foward", ConfigError.code),  # in the run file
        ('partition.cuts=["fc9"]', ConfigError.code),  # in the plan
        ("data.name=faults:bad_labels", DataError.code),  # in the data
        ("data.name=faults:infinite", NumericalError.code),  # in training: one rank finds it
    ],
)
def test_ranks_print_one_error(change: str, code: int, tmp_path: Path) -> None:
    run = write_run(tmp_path, RUN, "faults")
    ended = start(train_command(run, tmp_path / "out", 2, change), cwd=ROOT)
    assert_one_error(ended, code)
    if code == NumericalError.code:
        assert "| update 0 | action B" in ended.err
    else:
        assert not (tmp_path / "out").exists()


def test_a_missing_run_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("train", str(tmp_path / "none.toml")) == ConfigError.code
    text = capsys.readouterr().err
    assert str(tmp_path / "none.toml") in text
    assert text.endswith(" [toml.unreadable]\n")


def test_several_stages_without_ranks_print_the_commands_that_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_in_process("train", str(write_run(tmp_path, RUN))) == ConfigError.code
    text = capsys.readouterr().err
    assert "--ranks 2" in text
    assert "srun --mpi=pmix -n 2" in text
    assert text.endswith("\n[mesh.no-launcher]\n")


def test_ranks_of_a_users_own_launcher_print_one_error(
    tmp_path: Path, clean: dict[str, str], mpirun: str
) -> None:
    """No process has read the run file before the ranks do."""
    words = [*DTRAIN, "train", str(write_run(tmp_path, RUN)), "--set", "partition.blocks=1"]
    ended = start([mpirun, "-n", "2", *words], env=clean, cwd=tmp_path)
    text = f"{ended.out}\n{ended.err}"
    assert (ended.code, ended.left) == (ConfigError.code, ())
    assert text.count("dtrain: ") == 1, text
    assert "Traceback" not in text


def test_ranks_within_ranks_are_refused(tmp_path: Path, clean: dict[str, str], mpirun: str) -> None:
    inner = train_command(write_run(tmp_path, RUN), tmp_path / "out", 2)
    ended = start([mpirun, "-n", "2", *inner], env=clean, cwd=tmp_path)
    assert (ended.code, ended.left) == (ConfigError.code, ())
    assert "--ranks" in ended.err
