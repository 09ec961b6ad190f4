"""Ranks that fail while they train: which rank reports, what is left, and the restart."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import SAVED_CODE, CheckpointError, ConfigError, HangError, RankLostError
from tests import outcome
from tests.conftest import ROOT
from tests.process import Ended, start, sweep
from tests.system.programs import (
    run_in_process,
    train,
    train_command,
    wait_until_gone,
    write_run,
)

RUN = """
epochs = 2
batch-size = 50
threads = 1
[data]
name = "blobs:blobs"
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


TIMEOUTS = """
[timeouts]
start = 0
first-update = 0
update = 10
collective = 0
checkpoint = 10
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run file beside the faulty user code."""
    return write_run(tmp_path, RUN, "faults")


def command(run: Path, net: str, *sets: str, out: str = "out", ranks: int = 2) -> list[str]:
    """Return the command that trains a net of the user's."""
    return train_command(run, run.parent / out, ranks, f"model.name=faults:{net}", *sets)


def summary(run: Path, out: str = "out") -> dict[str, Any]:
    """Return the summary of a run."""
    return outcome.summary(run.parent / out)


def test_user_code_that_raises_ends_the_job_with_its_traceback_first(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything has ended ten seconds after the report, with replicas that are not involved; the
    failed rank leaves its last events."""
    mark = f"DTRAIN_MARK={os.getpid()}faults"
    child = subprocess.Popen(
        command(run, "raising", ranks=4),
        env=os.environ | dict([mark.split("=")]),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stderr is not None
        text, reported = "", 0.0
        for line in child.stderr:
            text += line
            reported = reported or ("ArithmeticError" in line and time.monotonic()) or 0.0
        child.wait(timeout=10)
        assert child.returncode == 1, text
        wait_until_gone(mark, 10 - (time.monotonic() - reported))
    finally:
        sweep(mark)
        child.wait()
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines[0].startswith("Traceback"), text
    assert text.count("Traceback (most recent call last)") == 1
    assert 'faults.py", line' in text
    result = summary(run)
    assert (result["status"], result["error_key"]) == ("failed", None)
    # One of two replicas was first.
    replica = 0 if "replica 0" in result["error"] else 1
    location = f"[replica {replica} stage 1 | update 2 | action F1.0]"
    rank = f"[rank {2 * replica + 1} of 4 on {platform.node()}]"
    assert result["error"] == f"ArithmeticError: the user's own mistake {location} {rank}"
    assert location in text
    assert rank in text
    assert not (run.parent / "out" / "owner.json").exists()
    record = run.parent / "out" / "flight" / f"rank-{2 * replica + 1:05d}.txt"
    assert "ArithmeticError: the user's own mistake" in record.read_text().splitlines()[0]
    capsys.readouterr()
    assert run_in_process("flight", run.parent / "out") == 0
    row = rf"^failed +rank {2 * replica + 1} on .*: ArithmeticError: .* at faults.py:"
    assert re.search(row, capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("net", "error", "code"),
    [("leaving", "SystemExit", RankLostError.code), ("failing", "KeyError", 1)],
)
def test_user_code_that_leaves_or_cannot_be_built_ends_the_job(
    net: str, error: str, code: int, run: Path
) -> None:
    ended = start(command(run, net), limit_s=60, cwd=ROOT)
    assert (ended.late, ended.code, ended.left) == (False, code, ())
    # A model is tried on torch's meta device first, so one traceback may hold two parts.
    assert 1 <= ended.err.count(f"\n{error}") <= 2, ended.err
    if net == "leaving":
        assert "action F1.0" in ended.err
        assert summary(run)["status"] == "failed"


def train_here(run: Path, out: str, net: str) -> None:
    """Train a net of the user's in this process, on one stage."""
    sets = ["--set", f"model.name=faults:{net}", "--set", "mesh.stages=1"]
    assert run_in_process("train", run, "--out", run.parent / out, *sets) == 0


def test_forked_processes_of_a_user_are_no_ranks(tmp_path: Path) -> None:
    """A signal ends them in silence; they write no record, and their errors end no job."""
    run = write_run(tmp_path, RUN, "pooled")
    ended = train(run, tmp_path / "out", 2, "data.name=pooled:blobs", "model.name=pooled:net")
    assert "stopped by" not in ended.err + ended.out
    assert ended.err.count("KeyError") == 1, ended.err  # of the process that raises
    result = outcome.summary(tmp_path / "out")
    assert (result["status"], result["epochs"]) == ("finished", 2)
    assert not (tmp_path / "out" / "flight").exists()


HANGS = {
    "sleep": ("hang.no-progress", "section 'update'", "in forward"),
    "stop": ("hang.no-answer", "is stopped", "rank 0 for "),
    "save": ("hang.no-progress", "section 'checkpoint'", "at faults.py:"),
    "start": ("hang.no-progress", "section 'start'"),
}
"""By hang: the key of the error, and parts of its message."""


def test_a_run_that_hangs_names_the_cause_and_resumes(run: Path) -> None:
    """Rank 1 hangs in user code, in a save and in the start, or is stopped; all at the same time.

    All ranks are gone, each that answers has left its record, and the checkpoint is whole.
    """
    run.write_text(f"{run.read_text()}{TIMEOUTS}")

    def end(how: str) -> Ended:
        environ = os.environ | {"DTRAIN_TEST_HANG": how}
        sets = ["timeouts.start=12"] if how == "start" else []
        return start(command(run, "hanging", *sets, out=how), limit_s=200, env=environ, cwd=ROOT)

    with ThreadPoolExecutor() as pool:
        runs = dict(zip(HANGS, pool.map(end, HANGS), strict=True))
    for how, ended in runs.items():
        assert (ended.late, ended.code, ended.left) == (False, HangError.code, ()), ended.err
        (line,) = (line for line in ended.err.splitlines() if f"[{HANGS[how][0]}]" in line)
        assert "rank 1 of 2 on " in line
        assert all(part in line for part in HANGS[how]), line
        if how == "start":
            assert not (run.parent / how).exists()
            continue
        assert (summary(run, how)["status"], summary(run, how)["error_key"]) == (
            "failed",
            HANGS[how][0],
        )
        assert not (run.parent / how / "owner.json").exists()
        records = list((run.parent / how / "flight").glob("rank-*.txt"))
        assert len(records) == 2
    train_here(run, "sleep", "hanging")
    train_here(run, "straight", "hanging")
    assert summary(run, "sleep")["digest"] == summary(run, "straight")["digest"]
    assert (summary(run, "sleep")["attempts"], summary(run, "sleep")["updates"]) == (2, 58)


def test_a_full_disk_is_named_and_ends_the_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's files must be shorter than a shard, once a checkpoint is complete; with space again
    the run resumes."""
    environ = {"DTRAIN_TEST_OUT": str(run.parent / "out")}
    ended = start(command(run, "filling"), limit_s=60, env=os.environ | environ, cwd=ROOT)
    assert (ended.late, ended.code, ended.left) == (False, CheckpointError.code, ()), ended.err
    part = str(run.parent / "out" / "checkpoints" / "update-00000058.part")
    assert ended.err.count(part) == 1
    assert "Traceback" not in ended.err
    result = summary(run)
    assert result["status"] == "failed"
    assert part in result["error"]
    monkeypatch.setenv("DTRAIN_TEST_OUT", str(run.parent / "elsewhere"))
    train_here(run, "out", "filling")
    assert (summary(run)["updates"], summary(run)["attempts"]) == (58, 2)


def test_an_interrupted_run_saves_and_leaves_nothing(run: Path) -> None:
    """While it runs, its folder is locked; `test_stop.py` has the other signals."""
    mark = f"DTRAIN_MARK={os.getpid()}interrupt"
    child = subprocess.Popen(
        command(run, "slow", "epochs=50"),
        env=os.environ | dict([mark.split("=")]),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    owner = run.parent / "out" / "owner.json"
    try:
        assert child.stdout is not None
        assert any("update " in line for line in child.stdout)
        sets = ["--set", "model.name=faults:slow", "--set", "mesh.stages=1"]
        second = run_in_process("train", run, "--out", run.parent / "out", *sets)
        assert second == ConfigError.code
        assert owner.exists()
        assert summary(run)["status"] == "running"
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=15)
        assert child.returncode == SAVED_CODE
        assert summary(run)["status"] == "stopped"
        assert not owner.exists()
        wait_until_gone(mark, 5)
    finally:
        sweep(mark)
        child.wait()
