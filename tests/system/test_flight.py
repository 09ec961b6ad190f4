"""A run hangs: SIGURG makes every rank write what it waits for, and the run continues.

One run on three ranks hangs three times, see `tests/hang.py`: stuck in compiled code, in a loop of
Python, and in another one once it has gone on, in which it is stopped.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dtrain.monitoring.hang_report import hang_report
from tests import outcome
from tests.conftest import ROOT
from tests.hang import release, wait_for, write_hanging_run
from tests.process import start, sweep
from tests.system.programs import train_command, wait_until_gone, write_run

WAIT_S = 0.5
"""Seconds for which ranks have waited at least when a signal comes."""

HOOK = """
import os, sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
                raise ImportError("libtorch of this node")


sys.meta_path.insert(0, Finder())
"""


@dataclass(frozen=True)
class Answer:
    """Files that the ranks wrote on a signal, by name, and the report of `dtrain flight`."""

    files: dict[str, str]
    report: str

    @property
    def records(self) -> list[str]:
        """The records of the three ranks."""
        return [self.files[f"rank-{rank:05d}.txt"] for rank in range(3)]


@dataclass(frozen=True)
class Hang:
    """The answers of the phases, and how the run ended."""

    answers: dict[str, Answer]
    code: int
    summary: dict[str, Any]
    files: set[str]


class HangingRun:
    """A training run whose middle stage hangs, see `tests/hang.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.flight = folder, folder / "out" / "flight"
        self.mark = f"DTRAIN_MARK={os.getpid()}flight"
        words = train_command(write_hanging_run(folder), folder / "out", 3)
        environ = os.environ | dict([self.mark.split("=")])
        self.child = subprocess.Popen(words, env=environ, cwd=ROOT)

    def ask(
        self, phase: str, number: int, records: tuple[int, ...], report: Callable[[], str]
    ) -> Answer:
        """Send a signal in a phase; return the answer once these ranks have written records."""
        wait_for(self.folder / phase)
        time.sleep(2 * WAIT_S)
        for path in self.flight.glob("rank-*.txt"):
            path.unlink()
        self.child.send_signal(number)
        if number == signal.SIGTERM:  # the launcher passes it on and waits; a second one ends it
            time.sleep(1.5)
            self.child.send_signal(number)
        wait_for(*(self.flight / f"rank-{rank:05d}.txt" for rank in records))
        if phase == "stuck":
            wait_for_text(self.flight / "rank-00001.stacks", "in forward")
        files = {path.name: path.read_text() for path in self.flight.iterdir()}
        return Answer(files, report())

    def ended(self) -> int:
        """Return the exit code; assert that no process of the run is left."""
        code = self.child.wait(timeout=30)
        wait_until_gone(self.mark, 5)
        return code


def wait_for_text(path: Path, text: str, limit_s: float = 30.0) -> None:
    """Wait until a file contains a text."""
    deadline = time.monotonic() + limit_s
    while text not in path.read_text():
        assert time.monotonic() < deadline, f"{path.name} has no '{text}'"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def hang(tmp_path_factory: pytest.TempPathFactory) -> Hang:
    """A run that hung three times, answered a signal each time, and was stopped in the last."""
    run = HangingRun(tmp_path_factory.mktemp("hang"))

    def report() -> str:
        return "\n".join(hang_report(run.folder / "out", stuck_s=WAIT_S))

    try:
        answers = {"stuck": run.ask("stuck", signal.SIGURG, (0, 2), report)}
        release(run.folder, "stuck")
        answers["sleeps"] = run.ask("sleeps", signal.SIGURG, (0, 1, 2), report)
        release(run.folder, "sleeps")
        answers["last"] = run.ask("last", signal.SIGTERM, (0, 1, 2), lambda: "")
        code = run.ended()
        names = {path.name for path in (run.folder / "out").iterdir()}
        return Hang(answers, code, outcome.summary(run.folder / "out"), names)
    finally:
        sweep(run.mark)
        run.child.wait()


def wait_line(record: str) -> str:
    """Return the line of the wait, which has lasted for a while."""
    (line,) = (line for line in record.splitlines() if line.startswith("waits for"))
    assert float(line.split()[2]) > WAIT_S
    return line


def test_waiting_ranks_name_the_rank_they_wait_for(hang: Hang) -> None:
    first, middle, last = hang.answers["sleeps"].records
    heads = [record.splitlines()[0] for record in (first, middle, last)]
    assert all(f"rank {rank} of 3 on " in line for rank, line in enumerate(heads))
    assert all("SIGURG" in line for line in heads)
    # The last rank waits for a message of the middle one, the first for the receipt of its own.
    assert "(50, 16) float32 from rank 1 with tag" in wait_line(last)
    assert "receive (50, 16) float32 from rank 1 of " in last
    assert "(world rank 1 on " in last
    assert "rank 1 " in wait_line(first)
    assert "send (50, 16) float32 to rank 1 of " in first
    # The middle one computes: its stack shows the line.
    assert not [line for line in middle.splitlines() if line.startswith("waits for")]
    assert "user.py" in middle
    assert "in forward" in middle


def test_one_command_reports_all_ranks(hang: Hang) -> None:
    report = hang.answers["sleeps"].report
    assert "3 of 3 ranks" in report
    assert re.search(r"^running +rank 1 on .*: F1.0 of update 4 .*user.py:", report, re.M)
    assert re.search(r"^cause .*rank 1 on ", report, re.M)


def test_the_run_goes_on_after_a_signal_and_all_ranks_leave_files(hang: Hang) -> None:
    """The run reaches the next phase; compiled code wrote stacks beside what Python wrote."""
    names = {f"rank-0000{rank}.{kind}" for rank in range(3) for kind in ("txt", "stacks")}
    assert set(hang.answers["sleeps"].files) == names
    assert "F1.0 update 6" in hang.answers["last"].records[1]


def test_a_rank_that_does_not_return_to_python_leaves_its_stack(hang: Hang) -> None:
    """As in a kernel or a dead file system: the handler of Python never runs there."""
    answer = hang.answers["stuck"]
    assert {name for name in answer.files if name.endswith(".txt")} == {
        "rank-00000.txt",
        "rank-00002.txt",
    }
    assert "2 of 3 ranks" in answer.report
    assert re.search(r"^no answer +rank 1 on .*in forward", answer.report, re.M)
    assert re.search(r"^cause .*rank 1 on ", answer.report, re.M)


def test_a_stopped_run_leaves_the_records_of_its_ranks(hang: Hang) -> None:
    """And nothing else: no process, no owner of the folder."""
    first, middle, last = hang.answers["last"].records
    for record in (first, middle, last):
        assert "SIGTERM" in record.splitlines()[0]
        assert "last events: " in record
    assert "rank 1 " in wait_line(first)
    assert "(50, 16) float32 from rank 1 with tag" in wait_line(last)
    assert not [line for line in middle.splitlines() if line.startswith("waits for")]
    assert hang.code == 128 + signal.SIGTERM
    assert hang.summary["status"] == "stopped"
    assert "SIGTERM" in hang.summary["error"]
    assert "owner.json" not in hang.files


def test_a_rank_without_torch_ends_the_others(tmp_path: Path) -> None:
    """They wait in MPI already, in a barrier that would never end."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = train_command(write_run(tmp_path), tmp_path / "out", 2)
    ended = start(words, limit_s=60, env=environ, cwd=ROOT)
    assert not ended.late
    assert (ended.code, ended.left) == (1, ())
    assert "ImportError: libtorch of this node" in ended.err
