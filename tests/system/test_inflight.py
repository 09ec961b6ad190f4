"""All-reduces in flight when a rank fails or a job is stopped: no hang, nothing left.

`tests/mpi/test_inflight.py` has runs that end normally.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import outcome
from tests.conftest import ROOT
from tests.hang import wait_for
from tests.process import start, sweep
from tests.system.programs import train_command, wait_until_gone, write_run

RUN = """
epochs = 2
batch-size = 100
threads = 1
[data]
name = "blobs:blobs"
[model]
name = "inflight:sleeping"
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


def command(run: Path, *sets: str) -> list[str]:
    """Return the command that trains a net of the user's on two replicas."""
    return train_command(run, run.parent / "out", 2, *sets)


def test_a_rank_that_raises_reports_and_nothing_is_left(run: Path) -> None:
    ended = start(command(run, "model.name=inflight:raising"), limit_s=60, cwd=ROOT)
    assert (ended.late, ended.code, ended.left) == (False, 1, ()), ended.err
    assert ended.err.count("Traceback (most recent call last)") == 1
    assert "ArithmeticError: raised with a mean in flight" in ended.err
    assert "[replica 1 stage 0 | update 2 | action F0.0]" in ended.err
    assert outcome.summary(run.parent / "out")["status"] == "failed"


def test_a_stopped_run_leaves_nothing(run: Path) -> None:
    mark, sleeps = f"DTRAIN_MARK={os.getpid()}inflight", run.parent / "sleeps"
    environ = os.environ | dict([mark.split("=")]) | {"DTRAIN_TEST_SLEEPS": str(sleeps)}
    child = subprocess.Popen(command(run), env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(sleeps)
        for _ in range(2):  # the first asks for a checkpoint, which a rank that sleeps cannot reach
            child.send_signal(signal.SIGTERM)
            time.sleep(1.2)
        child.communicate(timeout=15)
        assert child.returncode == 128 + signal.SIGTERM
        assert outcome.summary(run.parent / "out")["status"] == "stopped"
        record = (run.parent / "out" / "flight" / "rank-00001.txt").read_text()
        assert "a mean of 1 tensors of replicas" in record.partition("last events")[0]
        wait_until_gone(mark, 5)
        assert not (run.parent / "out" / "owner.json").exists()
    finally:
        sweep(mark)
        child.wait()
