"""Ranks that fail while they train: who speaks, what is left, and that a run goes on afterwards."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import outcome
from tests.conftest import ROOT
from tests.process import carriers, start, sweep

RUN = """
epochs = 2
batch-size = 50
threads = 1
[data]
name = "digits"
[model]
name = "faults:NET"
[mesh]
stages = 2
[partition]
cuts = [2]
[optimizer]
name = "adam"
[log]
every-s = 1
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run file beside the faulty user code."""
    source = ROOT / "tests" / "system" / "user" / "faults.py"
    (tmp_path / "faults.py").write_text(source.read_text())
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def command(run: Path, net: str, out: str = "out", ranks: int = 2) -> list[str]:
    words = [sys.executable, "-m", "dtrain", "train", str(run), "--ranks", str(ranks)]
    return [*words, "--out", str(run.parent / out), "--set", f"model.name=faults:{net}"]


def summary(run: Path, out: str = "out") -> dict[str, Any]:
    return outcome.summary(run.parent / out)


def test_user_code_that_raises_ends_the_job_with_its_traceback_first(run: Path) -> None:
    began = time.monotonic()
    ended = start(command(run, "raising"), limit_s=60, cwd=ROOT)
    assert ended.code == 1, ended.err
    assert time.monotonic() - began < 40
    assert ended.left == ()
    lines = [line for line in ended.err.splitlines() if line.strip()]
    assert lines[0].startswith("Traceback"), ended.err
    text = ended.err
    assert text.count("Traceback (most recent call last)") == 1
    assert "ArithmeticError: the user's own mistake" in text
    assert "[replica 0 stage 1 | update 2 | action F1.0]" in text
    assert 'faults.py", line' in text
    told = summary(run)
    place = f"[replica 0 stage 1 | update 2 | action F1.0] [rank 1 of 2 on {platform.node()}]"
    error = f"ArithmeticError: the user's own mistake {place}"
    assert (told["status"], told["error"]) == ("failed", error)
    assert f"[rank 1 of 2 on {platform.node()}]" in text
    assert not (run.parent / "out" / "owner.json").exists()


def test_everything_is_gone_within_ten_seconds_of_a_fault(run: Path) -> None:
    """The clock starts when the failing rank has spoken, with replicas that know nothing of it."""
    mark = f"DTRAIN_MARK={os.getpid()}faults"
    environ = os.environ | dict([mark.split("=")])
    child = subprocess.Popen(
        command(run, "raising", ranks=4), env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stderr is not None
        assert any("ArithmeticError" in line for line in child.stderr)
        spoke = time.monotonic()
        child.communicate(timeout=10)
        assert child.returncode == 1
        while carriers(mark) and time.monotonic() - spoke < 10:
            time.sleep(0.1)
        assert carriers(mark) == []
        assert time.monotonic() - spoke < 10
    finally:
        sweep(mark)
        child.wait()


def test_user_code_that_leaves_does_not_hang_the_others(run: Path) -> None:
    ended = start(command(run, "leaving"), limit_s=60, cwd=ROOT)
    assert not ended.late
    assert (ended.code, ended.left) == (1, ())
    assert "SystemExit" in ended.err
    assert "action F1.0" in ended.err
    assert summary(run)["status"] == "failed"


def test_a_model_that_cannot_be_made_shows_the_users_traceback_once(run: Path) -> None:
    ended = start(command(run, "failing"), limit_s=60, cwd=ROOT)
    assert ended.code == 1
    assert "KeyError: 'raised while the model is made'" in ended.err
    # torch's meta device is tried first, so one traceback may hold two parts; only one rank speaks.
    assert ended.err.count("KeyError: 'raised while the model is made'") <= 2
    assert ended.left == ()


def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(run: Path) -> None:
    died = run.parent / "died"
    environ = os.environ | {"DTRAIN_TEST_DIED": str(died)}
    ended = start(command(run, "dying"), limit_s=60, env=environ, cwd=ROOT)
    assert died.exists()
    assert ended.code != 0
    assert not ended.late
    assert ended.left == ()
    assert summary(run)["status"] in ("running", "stopped")  # as the other ranks were told
    again = start(command(run, "dying"), limit_s=60, env=environ, cwd=ROOT)
    assert again.code == 0, again.err
    assert "resumed" in again.out
    straight = start(command(run, "dying", "straight"), limit_s=60, env=environ, cwd=ROOT)
    assert straight.code == 0, straight.err
    assert summary(run)["digest"] == summary(run, "straight")["digest"]
    assert (summary(run)["attempts"], summary(run, "straight")["attempts"]) == (2, 1)


def test_a_full_disk_is_named_and_ends_the_job(run: Path) -> None:
    """A rank's files must be shorter than a shard, once a checkpoint stands."""
    environ = os.environ | {"DTRAIN_TEST_OUT": str(run.parent / "out")}
    ended = start(command(run, "filling"), limit_s=60, env=environ, cwd=ROOT)
    assert not ended.late
    assert (ended.code, ended.left) == (3, ()), ended.err
    part = run.parent / "out" / "checkpoints" / "update-00000058.part"
    assert f"cannot write the checkpoint {part}: " in ended.err
    assert "make room and start again" in ended.err
    assert ended.err.count("dtrain: cannot write") == 1
    assert "Traceback" not in ended.err
    told = summary(run)
    assert told["status"] == "failed"
    assert "cannot write the checkpoint" in told["error"]
    environ["DTRAIN_TEST_OUT"] = str(run.parent / "elsewhere")
    again = start(command(run, "filling"), limit_s=60, env=environ, cwd=ROOT)
    assert again.code == 0, again.err
    assert "resumed   29 of 58 updates were done before" in again.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(run: Path, number: int) -> None:
    mark = f"DTRAIN_MARK={os.getpid()}signal{number}"
    environ = os.environ | dict([mark.split("=")])
    child = subprocess.Popen(
        [*command(run, "slow"), "--set", "epochs=50"],
        env=environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert any("update " in line for line in child.stdout)
        child.send_signal(number)
        child.communicate(timeout=15)
        assert child.returncode == 128 + number
        assert summary(run)["status"] == "stopped"
        assert not (run.parent / "out" / "owner.json").exists()
        deadline = time.monotonic() + 5
        while carriers(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert carriers(mark) == []
    finally:
        sweep(mark)
        child.wait()


def test_a_folder_in_use_is_refused_by_its_owner(run: Path) -> None:
    words = [*command(run, "slow"), "--set", "epochs=50"]
    child = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert child.stdout is not None
        assert any("update " in line for line in child.stdout)
        second = start(words, limit_s=60, cwd=ROOT)
        assert second.code == 2, second.err
        assert "belongs to a run that has not given it back" in second.err
        assert str(run.parent / "out" / "owner.json") in second.err
        assert summary(run)["status"] == "running"
    finally:
        child.terminate()
        child.wait()
