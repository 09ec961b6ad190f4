"""A run hangs: SIGUSR1 makes every rank write what it waits for, and the run continues."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import outcome
from tests.conftest import ROOT
from tests.hang import place
from tests.process import start, sweep

MORE = """
import collections
import itertools


class Failing(nn.Linear):
    def forward(self, input):
        self.seen = getattr(self, "seen", 0) + self.training
        if self.seen == 3:
            raise ArithmeticError("the user's own mistake")
        return super().forward(input)


class Stuck(nn.Linear):
    def forward(self, input):
        self.seen = getattr(self, "seen", 0) + self.training
        if self.seen == 3:
            pathlib.Path("HUNG").touch()
            collections.deque(itertools.repeat(0), maxlen=0)
        return super().forward(input)


def plain():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 10)
    )


def stuck():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), Stuck(16, 16), nn.Linear(16, 10)
    )


def failing():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), Failing(16, 10)
    )
"""

HOOK = """
import os, signal, sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            ACTION


sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run file beside user code whose middle stage hangs in its third batch."""
    return place(tmp_path, MORE)


def command(run: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "dtrain", "train", str(run), "--ranks", "3"]
    return [*words, "--out", str(run.parent / "out"), *more]


@pytest.fixture
def hung(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Such a run, hanging for two seconds already."""
    yield from started(run)


@pytest.fixture
def stuck(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run that hangs where no handler of Python runs."""
    yield from started(run, "--set", "model.name=user:stuck")


def started(run: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a run that hangs, and sweep it away afterwards."""
    mark = f"DTRAIN_MARK={os.getpid()}flight"
    environ = os.environ | dict([mark.split("=")])
    child = subprocess.Popen(command(run, *more), env=environ, cwd=ROOT)
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
    # One command says it of all of them.
    words = [sys.executable, "-m", "dtrain", "flight", str(run.parent / "out")]
    told = start(words, limit_s=30, cwd=ROOT)
    assert told.code == 0, told.err
    assert "(SIGUSR1): 3 of 3 ranks answered" in told.out
    assert re.search(
        r"^running    rank 1 on .*: F1.0 of update 2 for \d+ s, at user.py:", told.out, re.M
    )
    assert "cause      likely rank 1 on " in told.out
    assert "2 of the other 2 ranks wait for it" in told.out
    # Nothing was disturbed: the run ends as if nobody had asked.
    (run.parent / "go").touch()
    assert hung.wait(timeout=60) == 0
    assert outcome.summary(run.parent / "out")["status"] == "finished"
    # Who asked may still read; C wrote stacks beside what Python wrote.
    names = {path.name for path in (run.parent / "out" / "flight").iterdir()}
    assert names == {f"rank-0000{rank}.{kind}" for rank in range(3) for kind in ("txt", "stacks")}


def waits(text: str) -> str:
    """Return the line that tells the wait, which has lasted for seconds."""
    (line,) = (line for line in text.splitlines() if line.startswith("waits for"))
    assert float(line.split()[2]) > 1.5
    return line


def test_a_stopped_run_leaves_what_its_ranks_did(run: Path, hung: subprocess.Popen[bytes]) -> None:
    hung.send_signal(signal.SIGTERM)
    assert hung.wait(timeout=30) == 128 + signal.SIGTERM
    texts = dumps(run)
    assert all("Stopped: stopped by SIGTERM" in text.splitlines()[0] for text in texts)
    assert all("last events: " in text for text in texts)
    first, middle, last = texts
    assert "rank 1 " in waits(first)
    assert "(50, 16) float32 from rank 1 with tag" in waits(last)
    assert "is in no wait" in middle
    told = outcome.summary(run.parent / "out")
    assert told["status"] == "stopped"
    assert "another rank that died: see the job's log" in told["error"]
    assert not (run.parent / "out" / "owner.json").exists()


def test_a_rank_that_does_not_come_back_to_python_leaves_its_stack(
    run: Path, stuck: subprocess.Popen[bytes]
) -> None:
    """As in a kernel or a dead file system: the handler of Python never runs there."""
    stuck.send_signal(signal.SIGUSR1)
    stacks = run.parent / "out" / "flight" / "rank-00001.stacks"
    limit = time.monotonic() + 30
    while "in forward" not in stacks.read_text():
        assert time.monotonic() < limit, "no stack was written"
        time.sleep(0.05)
    for rank in (0, 2):
        wait_for(run.parent / "out" / "flight" / f"rank-0000{rank}.txt")
    assert not (run.parent / "out" / "flight" / "rank-00001.txt").exists()
    told = start([sys.executable, "-m", "dtrain", "flight", str(run.parent / "out")], cwd=ROOT)
    assert "2 of 3 ranks answered" in told.out
    assert re.search(
        r"^no answer  rank 1 on .*: inside compiled code, .*in forward", told.out, re.M
    )
    assert "cause      likely rank 1 on " in told.out


def hooked(run: Path, action: str) -> dict[str, str]:
    """Return an environment in which ranks do `action` when they import torch, after MPI."""
    (run.parent / "sitecustomize.py").write_text(HOOK.replace("ACTION", action))
    return os.environ | {"PYTHONPATH": str(run.parent)}


def test_asking_while_ranks_start_ends_nothing(run: Path) -> None:
    """Until there is a world and a run folder, stacks go to the log."""
    environ = hooked(run, "os.kill(os.getpid(), signal.SIGUSR1)")
    words = command(run, "--set", "model.name=user:plain")
    ended = start(words, limit_s=60, env=environ, cwd=ROOT)
    assert ended.code == 0, ended.err
    assert ended.err.count("Current thread") == 3
    assert outcome.summary(run.parent / "out")["status"] == "finished"


def test_a_rank_without_torch_ends_the_others(run: Path) -> None:
    """They wait in MPI already, in a barrier that would never end."""
    rank = "os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK')) == '1'"
    environ = hooked(run, f"if {rank}: raise ImportError('libtorch of this node')")
    ended = start(command(run), limit_s=60, env=environ, cwd=ROOT)
    assert not ended.late
    assert (ended.code, ended.left) == (1, ())
    assert "ImportError: libtorch of this node" in ended.err


def test_a_failed_rank_leaves_its_last_events(run: Path) -> None:
    ended = start(command(run, "--set", "model.name=user:failing"), limit_s=60, cwd=ROOT)
    assert ended.code == 1, ended.err
    text = (run.parent / "out" / "flight" / "rank-00002.txt").read_text()
    assert "ArithmeticError: the user's own mistake" in text.splitlines()[0]
    assert "has failed; its last event is " in text
    assert "is at work" not in text
    told = start([sys.executable, "-m", "dtrain", "flight", str(run.parent / "out")], cwd=ROOT)
    assert re.search(r"^failed     rank 2 on .*: ArithmeticError: .* at user.py:", told.out, re.M)
    assert "received  " in text
