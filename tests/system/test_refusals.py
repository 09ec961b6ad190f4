"""Mistakes in run files, meshes and data, on real ranks: one message, no traceback, the exit code.

`tests/rule` has each mistake in one process; here is one of each place where ranks detect it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.errors import ConfigError, DataError, NumericalError
from tests.conftest import ROOT
from tests.process import start
from tests.system.conftest import Shared
from tests.system.programs import RUN, assert_one_error, run_in_process, train_command, write_run


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("objective.name=mono-foward", ConfigError.code),  # on all ranks
        ("optimizer.lr=1e300", NumericalError.code),  # in training, on one rank
    ],
)
def test_ranks_print_one_error(change: str, code: int, tmp_path: Path) -> None:
    run = write_run(tmp_path, RUN, "faults")
    ended = start(train_command(run, tmp_path / "out", 2, change), cwd=ROOT)
    assert_one_error(ended, code)
    if code == NumericalError.code:
        assert "| update 1 | action B" in ended.err
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("run file", ConfigError.code),
        ("mesh", ConfigError.code),
        ("plan", ConfigError.code),
        ("data", DataError.code),
        ("evaluate: key", ConfigError.code),
    ],
)
def test_ranks_of_a_users_own_launcher_print_one_error(
    name: str, code: int, shared: Shared
) -> None:
    """No process has read the run file before the ranks do."""
    first, second = shared.results[name]
    assert (first.code, second.code) == (code, code)
    assert first.err.count("dtrain: ") == 1
    assert (first.out, second.out, second.err) == ("", "", "")
    assert "Traceback" not in first.err
    assert not (shared.folder / "none").exists()


def test_ranks_within_ranks_are_refused(shared: Shared) -> None:
    for result in shared.results["nested"]:
        assert result.code == ConfigError.code
        assert "--ranks" in result.err


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
