"""A run hangs: SIGUSR1 makes every rank write what it waits for, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import outcome
from tests.conftest import ROOT
from tests.process import start, sweep

USER = """
import pathlib
import time

from torch import nn


class Hanging(nn.Linear):
    def forward(self, input):
        self.seen = getattr(self, "seen", 0) + self.training
        if self.seen == 3:
            pathlib.Path("HUNG").touch()
            while not pathlib.Path("GO").exists():
                time.sleep(0.05)
        return super().forward(input)


class Failing(nn.Linear):
    def forward(self, input):
        self.seen = getattr(self, "seen", 0) + self.training
        if self.seen == 3:
            raise ArithmeticError("the user's own mistake")
        return super().forward(input)


def hanging():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), Hanging(16, 16), nn.Linear(16, 10)
    )


def failing():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), Failing(16, 10)
    )
"""

RUN = """
epochs = 1
batch-size = 50
threads = 1
[data]
name = "digits"
[model]
name = "user:hanging"
[mesh]
stages = 3
[partition]
cuts = [2, 4]
[optimizer]
name = "adam"
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run file beside user code whose middle stage hangs in its third batch."""
    (tmp_path / "user.py").write_text(
        USER.replace("HUNG", f"{tmp_path}/hung").replace("GO", f"{tmp_path}/go")
    )
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def command(run: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "dtrain", "train", str(run), "--ranks", "3"]
    return [*words, "--out", str(run.parent / "out"), *more]


@pytest.fixture
def hung(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Such a run, hanging for two seconds already."""
    mark = f"DTRAIN_MARK={os.getpid()}flight"
    child = subprocess.Popen(command(run), env=os.environ | dict([mark.split("=")]), cwd=ROOT)
    try:
        wait_for(run.parent / "hung")
        time.sleep(2)
        yield child
    finally:
        sweep(mark)
        child.wait()


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit, f"{path.name} never came"
        time.sleep(0.05)


def dumps(run: Path) -> list[str]:
    """Return what the three ranks wrote, once all have."""
    paths = [run.parent / "out" / "flight" / f"rank-{rank:05d}.txt" for rank in range(3)]
    for path in paths:
        wait_for(path)
    return [path.read_text() for path in paths]


def test_a_hang_is_told_by_those_who_wait(run: Path, hung: subprocess.Popen[bytes]) -> None:
    hung.send_signal(signal.SIGUSR1)
    first, middle, last = dumps(run)
    head = [text.splitlines()[0] for text in (first, middle, last)]
    assert all(f"rank {rank} of 3 on " in line for rank, line in enumerate(head))
    assert all(line.endswith(": SIGUSR1") for line in head)
    # The last waits for what the middle one has not made; the first for it to take what it made.
    assert "(50, 16) float32 from rank 1 with tag" in waits(last)
    assert "receive (50, 16) float32 from rank 1 of " in last
    assert "(world rank 1 on " in last
    assert "to rank 1 with tag" in waits(first) or "rank 1 to take" in waits(first)
    assert "send (50, 16) float32 to rank 1 of " in first
    # The middle one is at work: its stack says where, its last action which batch.
    assert "is in no wait" in middle
    assert "user.py" in middle
    assert "in forward" in middle
    # Nothing was disturbed: the run ends as if nobody had asked.
    (run.parent / "go").touch()
    assert hung.wait(timeout=60) == 0
    assert outcome.summary(run.parent / "out")["status"] == "finished"


def waits(text: str) -> str:
    """Return the line that tells the wait, which has lasted for seconds."""
    (line,) = (line for line in text.splitlines() if line.startswith("waits for"))
    assert float(line.split()[2]) > 1.5
    return line


def test_a_stopped_run_leaves_what_its_ranks_did(run: Path, hung: subprocess.Popen[bytes]) -> None:
    hung.send_signal(signal.SIGTERM)
    assert hung.wait(timeout=30) == 128 + signal.SIGTERM
    texts = [path.read_text() for path in (run.parent / "out" / "flight").glob("rank-*.txt")]
    assert texts, "the first rank that is told ends the others, after it has written"
    assert all("Stopped: stopped by SIGTERM" in text.splitlines()[0] for text in texts)
    assert all("last events: " in text for text in texts)


def test_a_failed_rank_leaves_its_last_events(run: Path) -> None:
    ended = start(command(run, "--set", "model.name=user:failing"), limit_s=60, cwd=ROOT)
    assert ended.code == 1, ended.err
    text = (run.parent / "out" / "flight" / "rank-00002.txt").read_text()
    assert "ArithmeticError: the user's own mistake" in text.splitlines()[0]
    assert "received  " in text
