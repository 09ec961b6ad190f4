"""The watchdog: a run that hangs ends and names the cause; a slow run is never ended.

Ranks are flight recorders of this process whose last events and waits a case sets; each has a
watchdog of its own. The cases of one table run at the same time, since they only wait.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dtrain.comm.flight_recorder import FlightRecorder
from dtrain.errors import DtrainError, HangError
from dtrain.watchdog.limits import FACTOR, Limits, Pulse
from dtrain.watchdog.observer import Observer
from dtrain.watchdog.positions import Position, PositionFiles
from dtrain.watchdog.watchdog import Watchdog

LIMIT_S = 1.5
"""Limit of an update; a loaded machine delays threads by less than its shares."""


@dataclass
class Ranks:
    """Three ranks with watchdogs, and how they ended.

    Attributes
    ----------
    errors : list of DtrainError
        What ranks have reported.
    codes : list of int
        Exit codes of ranks that ended by themselves.
    """

    folder: Path
    limit_s: float = LIMIT_S
    silent: tuple[int, ...] = ()
    errors: list[DtrainError] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [f"rank {rank} of 3 on n{rank}" for rank in range(3)]
        self.flights = [FlightRecorder(names[rank], rank, 3, f"n{rank}") for rank in range(3)]
        self.ended = threading.Event()
        self.watchdogs = [
            Watchdog(
                flight,
                names,
                [f"n{rank}" for rank in range(3)],
                Limits({"update": self.limit_s}),
                self.folder,
                self.report,
                self.codes.append,
            )
            for flight in self.flights
        ]
        for rank, flight in enumerate(self.flights):
            flight.enter("update")
            flight.note("action", "F1.0", "update", 17)
            if rank not in self.silent:
                self.watchdogs[rank].start()

    def report(self, error: DtrainError) -> None:
        """Take the error of the rank that reports."""
        self.errors.append(error)
        self.ended.set()

    def wait(self, rank: int, description: str, *peers: int) -> None:
        """Put a rank into a wait."""
        self.flights[rank].open_waits.append((time.perf_counter(), description, peers))

    def stop(self) -> None:
        """End the watchdogs."""
        for watchdog in self.watchdogs:
            watchdog.stop()


Case = Callable[[Path], Ranks]


def sleeping(folder: Path) -> Ranks:
    """Rank 1 is in user code; rank 0 waits for it, rank 2 for rank 0."""
    ranks = Ranks(folder)
    ranks.wait(0, "a message", 1)
    ranks.wait(2, "a mean", 0, 2)
    return ranks


def stopped(folder: Path) -> Ranks:
    """Rank 1 does not run; the others wait for it."""
    ranks = Ranks(folder, silent=(1,))
    ranks.wait(0, "a message", 1)
    ranks.wait(2, "a mean", 0, 1, 2)
    return ranks


def mismatched(folder: Path) -> Ranks:
    """Rank 1 calls another collective than ranks 0 and 2."""
    ranks = Ranks(folder)
    for rank in (0, 2):
        ranks.wait(rank, "a mean with tag 64", 0, 1, 2)
    ranks.wait(1, "a broadcast with tag 64", 0, 1, 2)
    return ranks


def undelivered(folder: Path) -> Ranks:
    """The network loses the messages of a mean that all ranks have joined."""
    ranks = Ranks(folder)
    for rank in range(3):
        ranks.wait(rank, "a mean with tag 64", 0, 1, 2)
    return ranks


def slow(folder: Path) -> Ranks:
    """Rank 1 has an event now and then; the others wait for it longer than the limit."""
    ranks = sleeping(folder)
    threading.Thread(target=tick, args=(ranks, 1), daemon=True).start()
    return ranks


def unlimited(folder: Path) -> Ranks:
    """A limit of 0 is none."""
    ranks = Ranks(folder, limit_s=0.0)
    ranks.wait(0, "a message", 1)
    return ranks


def tick(ranks: Ranks, rank: int) -> None:
    """Let a rank have events."""
    while not ranks.ended.wait(0.1):
        ranks.flights[rank].note("action", "F1.1", "update", 17)


HANGS = {
    sleeping: ("hang.no-progress", "rank 1 of 3 on n1", "rank 0 for a message"),
    stopped: ("hang.no-answer", "rank 1 of 3 on n1", "rank 0 for a message"),
    mismatched: ("hang.deadlock", "rank 1 of 3 on n1", "a broadcast with tag 64"),
    undelivered: ("hang.deadlock", "rank 2 of 3 on n2", "a mean with tag 64"),
}
"""By case: the key of the error, and parts of its message: a culprit, and what is waited for."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Ranks]:
    """All cases, once the hangs have ended and the others had three times their limit."""
    cases = (*HANGS, slow, unlimited)
    started = {case: case(tmp_path_factory.mktemp(case.__name__)) for case in cases}
    time.sleep(3 * LIMIT_S)
    for case in HANGS:
        started[case].ended.wait(30)
    for ranks in started.values():
        ranks.ended.set()
        ranks.stop()
    return started


@pytest.mark.parametrize("case", HANGS)
def test_a_hang_ends_with_one_report_of_its_cause(case: Case, runs: dict[Case, Ranks]) -> None:
    """All ranks that answer have left their records, with the stack of the culprit."""
    (error,) = runs[case].errors
    key, *parts = HANGS[case]
    assert (type(error), error.code, error.key) == (HangError, 6, key)
    assert all(part in error.message for part in parts), error.message
    records = {int(path.stem[5:]) for path in runs[case].folder.glob("rank-*.txt")}
    assert records == {0, 1, 2} - set(runs[case].silent)
    assert "action F1.0" in error.message or key == "hang.deadlock" or runs[case].silent


@pytest.mark.parametrize("case", [slow, unlimited])
def test_a_rank_that_makes_progress_or_has_no_limit_ends_nothing(
    case: Case, runs: dict[Case, Ranks]
) -> None:
    assert (runs[case].errors, runs[case].codes) == ([], [])
    assert not list(runs[case].folder.glob("rank-*.txt"))


def test_a_slow_rank_is_named_once_on_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = slow(tmp_path)
    text, deadline = "", time.monotonic() + 20
    while "rank 1" not in text and time.monotonic() < deadline:
        time.sleep(0.1)
        text += capfd.readouterr().err
    time.sleep(LIMIT_S / 2)
    text += capfd.readouterr().err
    ranks.ended.set()
    ranks.stop()
    assert text.count("dtrain: note: rank 1 of 3 on n1") == 1, text
    assert not ranks.errors


def test_a_run_folder_that_does_not_answer_ends_each_rank_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a dead file system: no rank can learn where the others are."""
    monkeypatch.setattr(PositionFiles, "has_verdict", lambda files: time.sleep(60))
    ranks, deadline = sleeping(tmp_path), time.monotonic() + 30
    while not ranks.codes and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks.stop()
    assert ranks.codes[:1] == [HangError.code]
    assert not ranks.errors


def test_limits_grow_with_the_pauses_of_this_run_and_own_stops_do_not_count() -> None:
    """Samples every second: an event at 0 and at 50, and a stop of the process at 60 to 5000."""
    limits = Limits({"update": 100.0, "evaluation": 7.0, "checkpoint": 0.0})
    pulse = Pulse(limits, 1.0)
    assert limits.of("update") == 100.0
    for now in range(61):
        assert not pulse.sample(float(now), 50.0 * (now >= 50), "update")
    assert limits.of("update") == FACTOR * 49
    assert limits.of("evaluation") == 7.0
    assert limits.of("checkpoint") == limits.of(None) == float("inf")
    assert pulse.still_s(60.0) == 10.0
    assert not pulse.is_current(5000.0)
    assert pulse.sample(5000.0, 50.0, "update")
    assert pulse.still_s(5001.0) == 1.0


def position(rank: int, still_s: float, limit_s: float | None, *peers: int) -> Position:
    """Return a position; a rank with peers waits for them."""
    what = f"rank {peers}" if peers else None
    text = ",".join(map(str, peers))
    return Position(rank, 1, 1, 0.0, still_s, limit_s, "update", None, None, what, text, None)


@pytest.mark.parametrize(
    ("rows", "culprits"),
    [
        # rank 2 saves a checkpoint, which may take longer than the update of the others
        ([(0, 100.0, 60.0, 2), (1, 100.0, 60.0, 2), (2, 100.0, 600.0)], None),
        ([(0, 100.0, 60.0, 2), (1, 100.0, 60.0, 2), (2, 100.0, 90.0)], [2]),
        # rank 1 computes, and rank 2 is stuck: what rank 1 does may take its time
        ([(0, 100.0, 60.0, 2), (1, 1.0, 60.0), (2, 100.0, 60.0)], None),
        # ranks 0 and 1 are deadlocked, and rank 2 waits for them
        ([(0, 100.0, 60.0, 1), (1, 100.0, 60.0, 0), (2, 70.0, 60.0, 0)], [0, 1, 2]),
        ([(0, 100.0, 60.0, 1), (1, 100.0, 60.0, 0), (2, 50.0, 60.0, 0)], None),
        # without a limit of its own section no rank is stuck
        ([(0, 100.0, 60.0, 2), (1, 100.0, 60.0, 2), (2, 900.0, None)], None),
    ],
)
def test_the_positions_of_all_ranks_decide(
    rows: list[tuple[int, float, float | None]], culprits: list[int] | None
) -> None:
    observer = Observer(0, 3)
    observer.observe(0.0, [position(*row) for row in rows])
    hang = observer.hang(1.0, silent_s=20.0)
    assert (None if hang is None else sorted(hang.culprits)) == culprits


def test_a_watchdog_is_cheap_and_a_quick_run_writes_nothing(tmp_path: Path) -> None:
    """The two threads take less than 0.1 % of a core with the default limits' longest tick."""
    limits = Limits({"update": 600.0})
    assert limits.tick_s == 5.0
    flight, files = FlightRecorder("rank 0", 0, 1, "n0"), PositionFiles(tmp_path / "flight", 0)
    pulse = Pulse(limits, limits.tick_s)
    start = time.thread_time()
    for number in range(200):
        pulse.sample(float(number), flight.last_event_s(), flight.section)
        assert not files.has_verdict()
        assert not files.has_alarm()
    assert (time.thread_time() - start) / 200 < limits.tick_s / 1000
    assert os.listdir(tmp_path) == []
