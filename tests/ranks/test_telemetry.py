"""The flight recorder: what is kept, what is told, and that recording costs next to nothing."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.comm import context as family
from dtrain.comm.backends import threads
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.comm.flight_recorder import MAX_EVENTS, RECORD_KEYS, FlightRecorder, dump_stacks_on
from tests.ranks.contract import looking


def test_the_last_events_are_kept_in_order() -> None:
    flight = FlightRecorder()
    for number in range(MAX_EVENTS + 10):
        flight.note("action", number)
    lines = [line.split()[1:] for line in flight.text().splitlines() if " action " in line]
    assert lines == [["action", str(number)] for number in range(10, MAX_EVENTS + 10)]


def test_words_are_made_where_somebody_asks() -> None:
    """An event costs a tuple: what it is about is asked for its words only by `text`."""
    asked: list[int] = []

    class Fact:
        def __str__(self) -> str:
            asked.append(1)
            return "F3.0"

    flight = FlightRecorder()
    flight.note("action", Fact(), "took", 0.25)
    assert not asked
    assert "action    F3.0 took 0.250000 s" in flight.text()
    assert asked


def test_an_event_is_cheap() -> None:
    """Under a microsecond on a quiet machine; the best of many, with room for a busy one."""
    flight, best = FlightRecorder(), 1.0
    for _ in range(50):
        start = time.perf_counter()
        for number in range(200):
            flight.note("action", number, "update", 17)
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 3e-6


def test_ages_waits_and_stacks_are_told() -> None:
    flight = FlightRecorder("rank 3 of 4 on n1", 3)
    now = time.perf_counter()
    flight.open_waits += [(now - 5, "the outer thing", (1, 2)), (now - 2, "the inner thing", (0,))]
    flight.pending_sources.append(lambda: [(now - 1, "send b"), (now - 4, "receive a")])
    text = flight.text("SIGUSR1", sys._getframe())
    assert text.startswith("rank 3 of 4 on n1, process ")
    assert ": SIGUSR1\n" in text
    outer, inner = (line for line in text.splitlines() if line.startswith("waits for"))
    assert outer.startswith("waits for 5.0")
    assert inner.startswith("waits for 2.0")
    told = text[text.index("outstanding: 2") :].splitlines()[1:3]
    assert [line.split()[0][:2] for line in told] == ["4.", "1."], "the oldest first"
    assert "in test_ages_waits_and_stacks_are_told" in text


def test_a_dump_replaces_the_one_before(tmp_path: Path) -> None:
    flight = FlightRecorder("rank 12", 12)
    flight.folder = tmp_path / "flight"
    flight.dump("first")
    try:
        raise ZeroDivisionError("no number")
    except ZeroDivisionError as error:
        flight.dump("second", error)
    (found,) = flight.folder.iterdir()
    assert found.name == "rank-00012.txt"
    assert ": second" in found.read_text()
    assert "ZeroDivisionError: no number" in found.read_text()


def test_a_dump_never_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flight = FlightRecorder("rank 1")
    flight.folder = tmp_path / "missing" / "flight"
    flight.dump()
    assert "no flight record of rank 1" in capsys.readouterr().err
    flight.folder = None
    flight.dump("before the run folder is ours")
    assert "before the run folder is ours" in capsys.readouterr().err


def test_a_deadlock_leaves_what_each_rank_waited_for() -> None:
    """Ranks of threads have recorders of their own, which groups of one rank share."""
    texts: dict[int, str] = {}

    def work(comm: Comm) -> None:
        ring = comm.dup("ring")
        assert ring.flight is comm.flight
        ring.post_recv((comm.rank + 1) % 3, 2, [((4,), torch.int64)])
        try:
            ring.recv((comm.rank + 1) % 3, 2)
        finally:
            texts[comm.rank] = comm.flight.text()

    with pytest.raises(CommTimeout, match="deadlock"):
        threads.run_ranks(3, work, hosts=["a", "b", "c"])
    for rank, text in texts.items():
        peer = (rank + 1) % 3
        assert f"for (4,) int64 from rank {peer} with tag 2" in text
        place = f"rank {peer} of ring (world rank {peer} on {'abc'[peer]}) with tag 2"
        assert f"receive (4,) int64 from {place}" in text


def here(text: str) -> dict[str, Any]:
    """Return what a record tells programs."""
    found: dict[str, Any] = json.loads(text.splitlines()[1])
    return found


def test_a_record_tells_programs_who_waits_for_whom() -> None:
    flight = FlightRecorder("rank 3 of 8 on n1", 3, 8, "n1")
    flight.note("action", "F3.0", "update", 17)
    flight.open_waits.append((time.perf_counter() - 5, "a mean", (0, 1, 2, 7)))
    told = here(flight.text("SIGUSR1\nof somebody", sys._getframe()))
    assert tuple(told) == RECORD_KEYS
    assert 5 <= told.pop("wait_s") < 6
    assert abs(told.pop("unix_s") - time.time()) < 5
    assert 0 <= told.pop("idle_s") < 1
    assert "in test_a_record_tells" in told.pop("place")
    assert told == {
        **{"rank": 3, "size": 8, "host": "n1", "why": "SIGUSR1\nof somebody", "update": 17},
        **{"action": "F3.0", "failed": False, "what": "a mean", "peers": "0-2,7"},
    }


def test_a_record_that_nothing_happened_before_is_whole() -> None:
    told = here(FlightRecorder("rank 0").text())
    absent = {key for key, value in told.items() if value is None}
    assert absent == {"update", "action", "wait_s", "what", "place"}


def test_the_record_of_a_failure_is_not_replaced_by_what_it_caused(tmp_path: Path) -> None:
    flight = FlightRecorder("rank 1", 1)
    flight.folder = tmp_path
    flight.dump("ZeroDivisionError: none", ZeroDivisionError("none"))
    flight.dump("Stopped: stopped by SIGTERM", sys._getframe())
    text = (tmp_path / "rank-00001.txt").read_text()
    assert "ZeroDivisionError: none" in text.splitlines()[0]
    assert "has failed; its last event is 0.000 s old" in text
    assert "is at work" not in text
    assert here(text)["failed"]


def linger(comm: Comm) -> None:
    """Let the others come to their next wait; messages to itself show that this rank lives."""
    for _ in range(20):
        comm.post_recv(comm.rank, 1, [((3,), torch.float32)])
        comm.isend(torch.zeros(3), comm.rank, 1)
        comm.recv(comm.rank, 1)
        comm.transport.backend.idle(0, "the others")


def talk(comm: Comm, group: Comm, now: list[str]) -> None:
    """Call one verb after the other in a group of two, the second rank always first."""
    tensor = torch.zeros(3)
    for verb in ("recv", "exchange", "broadcast", "mean", "flush"):
        now.append(verb)
        if group.rank == 0:
            linger(comm)
        match verb:
            case "recv" if group.rank == 0:
                group.isend(tensor, 1, 4)
            case "recv":
                group.post_recv(0, 4, [((3,), torch.float32)])
                group.recv(0, 4)
            case "exchange":
                group.allgather_object(None)
            case "broadcast":
                group.broadcast_([tensor])
            case "mean":
                group.mean_([tensor])
            case "flush" if group.rank == 0:
                group.post_recv(1, 5, [((3,), torch.float32)])
                group.recv(1, 5)
            case "flush":
                group.isend(tensor, 0, 5)
                group.flush()


def test_what_each_verb_waits_for_is_told_by_ranks_of_the_world() -> None:
    """The odd ranks of the world are a group; its rank 0, world rank 1, comes later to all."""
    seen: dict[str, dict[str, Any]] = {}
    now: list[str] = []

    def work(comm: Comm) -> None:
        group = comm.split(comm.rank % 2, name="odd")
        if comm.rank % 2 == 0:
            return
        if group.rank:
            with looking(comm, lambda: seen.update({now[-1]: here(comm.flight.text())})):
                talk(comm, group, now)
        else:
            talk(comm, group, [])

    threads.run_ranks(4, work)
    peers = {verb: each["peers"] for verb, each in seen.items()}
    both = dict.fromkeys(("exchange", "broadcast", "mean"), "1,3")
    assert peers == {"recv": "1", "flush": "1"} | both
    for verb in ("exchange", "broadcast", "mean"):
        assert " of odd" in seen[verb]["what"]
        assert " with tag " in seen[verb]["what"]


def test_a_split_is_a_wait() -> None:
    told: list[dict[str, Any]] = []

    def work(comm: Comm) -> None:
        if comm.rank:
            linger(comm)
            told.append(here(flights[0].text()))
        else:
            flights.append(comm.flight)
        comm.split(0)

    flights: list[FlightRecorder] = []
    threads.run_ranks(2, work)
    assert told[0]["peers"] == "0-1"
    assert "all ranks of world, to split it" in told[0]["what"]


def test_a_long_wait_says_so_once_and_waits_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "SLOW_WAIT_S", 0.05)

    def work(comm: Comm) -> None:
        comm.flight.folder = tmp_path / "flight"
        end = time.perf_counter() + (0.2 if comm.rank == 2 else 0.0)
        while time.perf_counter() < end:
            linger(comm)
        comm.allgather_object(None)

    threads.run_ranks(3, work)
    told = [(tmp_path / "flight" / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert all(": no message for 0.05 s" in text.splitlines()[0] for text in told)
    assert "waits for 0.0" in told[0]
    err = capsys.readouterr().err
    assert err.count("dtrain: ") == 1
    assert "rank 0 of 3 on localhost has waited 0.05 s for the control data" in err
    assert str(tmp_path / "flight" / "rank-00000.txt") in err
    assert f"`dtrain flight {tmp_path}`" in err


def test_nothing_that_cannot_be_told_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under the log: neither a record nor an abort fails by what it says."""
    tried: list[str] = []

    class Full:
        def write(self, text: str) -> None:
            tried.append(text)
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            self.write("flush")

    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(sys, "stdout", Full())
    flight = FlightRecorder("rank 1")
    flight.dump("to stderr")
    flight.folder = Path("/dev/null")
    flight.dump("to a folder that is none")
    with pytest.raises(SystemExit) as end:
        Comm(SingleBackend()).abort(4)
    assert end.value.code == 4
    assert tried[-2:] == ["flush", "flush"]
    assert "to stderr" in tried[0]
    assert "no flight record of rank 1" in tried[-3]


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[FlightRecorder]:
    before = signal.getsignal(signal.SIGUSR1)
    flight = FlightRecorder("rank 2", 2)
    dump_stacks_on(signal.SIGUSR1)  # as every rank does before
    flight.dump_on_signal(signal.SIGUSR1)
    flight.set_folder(tmp_path / "flight")
    yield flight
    faulthandler.unregister(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_stacks_are_written_from_c_too(listening: FlightRecorder) -> None:
    assert listening.folder is not None
    os.kill(os.getpid(), signal.SIGUSR1)
    stacks = (listening.folder / "rank-00002.stacks").read_text()
    assert "Current thread" in stacks
    assert "in test_stacks_are_written_from_c_too" in stacks
    record = (listening.folder / "rank-00002.txt").read_text()
    assert ": SIGUSR1" in record.splitlines()[0]
    listening.close()
    assert (listening.folder / "rank-00002.stacks").exists(), "somebody may still read it"


def test_a_rank_that_nobody_asked_leaves_nothing(listening: FlightRecorder) -> None:
    assert listening.folder is not None
    assert (listening.folder / "rank-00002.stacks").exists()
    listening.close()
    assert not listening.folder.exists()
