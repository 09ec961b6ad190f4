"""The clock of a run: checkpoints by the minute, and a stop before the limit of the job."""

from __future__ import annotations

import math
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.comm.early_end import EarlyEnd
from dtrain.schedules.segments import TrainingLength
from dtrain.session.job_limit import JobLimit, ask_squeue, find_limit
from dtrain.session.requests import SAVE, TIME_LIMIT, reason, signal_request, stops
from dtrain.session.run_clock import LEAST_LEAD_S, MARGIN, RunClock


class Clocked:
    """A run clock with a time of its own; a segment has ten updates."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        in_segments: bool,
        limit_s: float = math.inf,
        minutes: float = 0.0,
    ) -> None:
        self.now, self.updates, self.said = 1000.0, 0, list[str]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        limit = JobLimit(math.inf, None)
        limit.end = self.now + limit_s
        run = SimpleNamespace(checkpoint=SimpleNamespace(every_minutes=minutes))
        plan: Any = SimpleNamespace(training_length=TrainingLength(10, 100, 10), run=run)
        self.early_end = EarlyEnd(Comm(SingleBackend()), in_segments)
        self.clock = RunClock(self.early_end, plan, self.said.append, limit)

    def train(self, updates: int, seconds: float) -> None:
        """Let updates pass; where a segment may not end early, the clock is read at its ends."""
        for _ in range(updates):
            self.now += seconds
            if self.early_end.in_segments:
                self.clock.check()
            self.clock.note_update(self.updates)
            self.updates += 1


def test_checkpoints_come_by_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is counted from the last checkpoint, whatever caused it."""
    run = Clocked(monkeypatch, True, minutes=1.0)
    run.train(5, 10.0)
    assert not run.early_end.passing_request
    run.clock.note_save(1.0)
    run.train(5, 10.0)
    assert not run.early_end.passing_request
    run.train(1, 10.0)
    assert run.early_end.passing_request == SAVE


@pytest.mark.parametrize(("in_segments", "stretch"), [(True, 1), (False, 10)])
def test_a_run_stops_while_a_stretch_a_save_and_an_evaluation_fit(
    in_segments: bool, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Clocked(monkeypatch, in_segments, limit_s=1000.0)
    run.train(4, 5.0)
    run.clock.note_save(20.0)
    run.clock.note_evaluation(30.0)
    run.train(1, 5.0)
    lead_s = run.clock.lead_s()
    assert lead_s == pytest.approx(MARGIN * (20.0 + 5.0 * stretch) + 30.0)
    run.now = 2000.0 - lead_s - 0.1
    run.clock.check()
    assert not run.early_end.requested
    run.now += 0.2
    run.clock.check()
    assert run.early_end.requested == TIME_LIMIT
    assert run.said == []


def test_a_short_job_is_not_stopped_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Clocked(monkeypatch, True, limit_s=60.0)
    run.clock.check()
    assert run.clock.lead_s() == LEAST_LEAD_S
    assert not run.early_end.requested
    run = Clocked(monkeypatch, True, limit_s=5.0)
    run.clock.check()
    assert run.early_end.requested == TIME_LIMIT
    assert len(run.said) == 1


@pytest.mark.parametrize(
    ("in_segments", "limit_s", "notes"),
    [
        (False, 60.0, 1),
        (False, 600.0, 0),
        (True, 100.0, 0),
        (False, math.inf, 0),
    ],
)
def test_a_segment_that_the_job_has_no_time_for_is_named_once(
    in_segments: bool, limit_s: float, notes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cure, once some updates are measured."""
    run = Clocked(monkeypatch, in_segments, limit_s=limit_s)
    run.train(6, 7.0)
    assert len(run.said) == notes
    assert all("[checkpoint] every" in line for line in run.said)


def test_a_run_says_where_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Clocked(monkeypatch, in_segments=False)
    run.train(3, 1.0)
    run.early_end.requested = signal_request(15)
    run.train(3, 1.0)
    (line,) = run.said
    assert "SIGTERM" in line
    assert "update 10" in line


def fake_squeue(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a `squeue` first on PATH that prints a text."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\necho '{text}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_slurm_says_when_the_job_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTRAIN_JOB_END_TIME", raising=False)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    end = round(time.time()) + 5000
    fake_squeue(tmp_path, datetime.fromtimestamp(end).isoformat(), monkeypatch)
    assert ask_squeue("7") == end
    limit = find_limit("auto")
    assert limit is not None
    deadline = time.monotonic() + 20
    while math.isinf(limit.end) and time.monotonic() < deadline:
        time.sleep(0.01)
    limit.close()
    assert limit.end - time.monotonic() == pytest.approx(end - time.time(), abs=1)
    fake_squeue(tmp_path, "N/A", monkeypatch)
    assert ask_squeue("7") is None
    known = find_limit("auto", {"SLURM_JOB_END_TIME": str(end)})
    assert known is not None
    known.close()
    assert known.end - time.monotonic() == pytest.approx(end - time.time(), abs=1)
    assert find_limit(False) is None


def test_a_stop_outweighs_a_checkpoint_and_has_a_reason() -> None:
    assert not stops(SAVE)
    assert stops(TIME_LIMIT)
    assert signal_request(10) > TIME_LIMIT > SAVE
    assert reason(signal_request(10)) == "stopped by SIGUSR1"
    assert "limit" in reason(TIME_LIMIT)
