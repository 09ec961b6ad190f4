"""All-reduces in flight when a rank fails or a job is stopped: no hang, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import outcome
from tests.conftest import ROOT
from tests.process import carriers, start, sweep
from tests.system.programs import train_command, write_run

RUN = """
epochs = 2
batch-size = 100
threads = 1
[data]
name = "blobs:blobs"
[model]
name = "inflight:plain"
[mesh]
stages = 1
[partition]
blocks = 1
[sync]
name = "never"
[optimizer]
name = "adam"
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run file beside user code that always has an all-reduce in flight."""
    return write_run(tmp_path, RUN, "inflight")


def command(run: Path, net: str, *sets: str) -> list[str]:
    """Return the command that trains a net of the user's on two replicas."""
    return train_command(run, run.parent / "out", 2, f"model.name=inflight:{net}", *sets)


def test_a_rank_that_raises_reports_and_nothing_is_left(run: Path) -> None:
    ended = start(command(run, "raising"), limit_s=60, cwd=ROOT)
    assert (ended.late, ended.code, ended.left) == (False, 1, ()), ended.err
    assert ended.err.count("Traceback (most recent call last)") == 1
    assert "ArithmeticError: raised with a mean in flight" in ended.err
    assert "[replica 1 stage 0 | update 2 | action F0.0]" in ended.err
    assert outcome.summary(run.parent / "out")["status"] == "failed"


def test_checkpoints_evaluation_and_the_end_have_nothing_in_flight(run: Path) -> None:
    """`finish_pending` completes it, with and without debug mode."""
    for sets in ((), ("debug=true", "epochs=3")):
        ended = start(command(run, "plain", *sets), limit_s=60, cwd=ROOT)
        assert (ended.code, ended.left) == (0, ()), ended.err
    assert outcome.summary(run.parent / "out")["updates"] == 3 * 15


def test_a_stopped_run_leaves_nothing(run: Path) -> None:
    mark, naps = f"DTRAIN_MARK={os.getpid()}inflight", run.parent / "naps"
    environ = os.environ | dict([mark.split("=")]) | {"DTRAIN_TEST_NAPS": str(naps)}
    words = command(run, "napping")
    child = subprocess.Popen(words, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not naps.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert naps.exists()
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=15)
        assert child.returncode == 128 + signal.SIGTERM
        assert outcome.summary(run.parent / "out")["status"] == "stopped"
        record = (run.parent / "out" / "flight" / "rank-00001.txt").read_text()
        assert "a mean of 1 tensors of replicas" in record.partition("last events")[0]
        deadline = time.monotonic() + 5
        while carriers(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert carriers(mark) == []
        assert not (run.parent / "out" / "owner.json").exists()
    finally:
        sweep(mark)
        child.wait()
