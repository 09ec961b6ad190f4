"""The flight recorder: its ring of events, its records, and that recording is cheap."""

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

from dtrain.comm.backends import threads
from dtrain.comm.backends.base import Deadlock
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.comm.flight_recorder import MAX_EVENTS, RECORD_KEYS, FlightRecorder, dump_stacks_on
from tests.ranks.contract import observed, observing
from tests.refusals import refuses


def test_the_last_events_are_kept_in_order() -> None:
    flight = FlightRecorder()
    for number in range(MAX_EVENTS + 10):
        flight.note("action", number)
    lines = [line.split()[1:] for line in flight.text().splitlines() if " action " in line]
    assert lines == [["action", str(number)] for number in range(10, MAX_EVENTS + 10)]


def test_events_are_formatted_only_in_a_record() -> None:
    """An event costs a tuple: its facts are formatted by `text` alone."""
    calls: list[int] = []

    class Fact:
        def __str__(self) -> str:
            calls.append(1)
            return "F3.0"

    flight = FlightRecorder()
    flight.note("action", Fact(), "took", 0.25)
    assert not calls
    assert "action    F3.0 took 0.250000 s" in flight.text()
    assert calls


def test_an_event_is_cheap() -> None:
    """Under a microsecond on a quiet machine; the best of many, with room for a busy one."""
    flight, best = FlightRecorder(), 1.0
    for _ in range(50):
        start = time.perf_counter()
        for number in range(200):
            flight.note("action", number, "update", 17)
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 3e-6


def test_a_record_shows_ages_waits_and_the_stack() -> None:
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
    pending = text[text.index("outstanding: 2") :].splitlines()[1:3]
    assert [line.split()[0][:2] for line in pending] == ["4.", "1."], "the oldest first"
    assert "in test_a_record_shows_ages_waits_and_the_stack" in text


def test_a_dump_replaces_the_one_before(tmp_path: Path) -> None:
    flight = FlightRecorder("rank 12", 12)
    flight.folder = tmp_path / "flight"
    flight.dump("first")
    try:
        raise ZeroDivisionError("no number")
    except ZeroDivisionError as error:
        flight.dump("second", error)
    (path,) = flight.folder.iterdir()
    assert path.name == "rank-00012.txt"
    assert ": second" in path.read_text()
    assert "ZeroDivisionError: no number" in path.read_text()


def test_a_dump_never_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flight = FlightRecorder("rank 1")
    flight.folder = tmp_path / "missing" / "flight"
    flight.dump()
    assert "rank 1" in capsys.readouterr().err
    flight.folder = None
    flight.dump("before the run folder is ours")
    assert "before the run folder is ours" in capsys.readouterr().err


def test_records_of_a_deadlock_show_the_wait_of_each_rank() -> None:
    """Each rank that is a thread has its own recorder, which all its groups share."""
    texts: dict[int, str] = {}

    def work(comm: Comm) -> None:
        ring = comm.dup("ring")
        assert ring.flight is comm.flight
        ring.post_recv((comm.rank + 1) % 3, 2, [((4,), torch.int64)])
        try:
            ring.recv((comm.rank + 1) % 3, 2)
        finally:
            texts[comm.rank] = comm.flight.text()

    with refuses(Deadlock, "comm.deadlock"):
        threads.run_ranks(3, work, hosts=["a", "b", "c"])
    for rank, text in texts.items():
        peer = (rank + 1) % 3
        assert f"for (4,) int64 from rank {peer} with tag 2" in text
        channel = f"rank {peer} of ring (world rank {peer} on {'abc'[peer]}) with tag 2"
        assert f"receive (4,) int64 from {channel}" in text


def json_record(text: str) -> dict[str, Any]:
    """Return the JSON line of a record."""
    record: dict[str, Any] = json.loads(text.splitlines()[1])
    return record


def test_the_json_line_has_the_wait_and_its_peers() -> None:
    flight = FlightRecorder("rank 3 of 8 on n1", 3, 8, "n1")
    flight.note("action", "F3.0", "update", 17)
    flight.open_waits.append((time.perf_counter() - 5, "a mean", (0, 1, 2, 7)))
    record = json_record(flight.text("SIGUSR1\nof a user", sys._getframe()))
    assert tuple(record) == RECORD_KEYS
    assert 5 <= record.pop("wait_s") < 6
    assert abs(record.pop("unix_s") - time.time()) < 5
    assert 0 <= record.pop("idle_s") < 1
    assert "in test_the_json_line" in record.pop("place")
    assert record == {
        **{"rank": 3, "size": 8, "host": "n1", "why": "SIGUSR1\nof a user", "update": 17},
        **{"action": "F3.0", "failed": False, "what": "a mean", "peers": "0-2,7"},
    }


def test_a_record_before_any_event_is_complete() -> None:
    record = json_record(FlightRecorder("rank 0").text())
    absent = {key for key, value in record.items() if value is None}
    assert absent == {"update", "action", "wait_s", "what", "place"}


def test_the_record_of_a_failure_is_not_replaced_by_that_of_the_signal_after_it(
    tmp_path: Path,
) -> None:
    flight = FlightRecorder("rank 1", 1)
    flight.folder = tmp_path
    flight.dump("ZeroDivisionError: none", ZeroDivisionError("none"))
    flight.dump("Stopped: stopped by SIGTERM", sys._getframe())
    text = (tmp_path / "rank-00001.txt").read_text()
    assert "ZeroDivisionError: none" in text.splitlines()[0]
    assert "has failed; its last event is 0.000 s old" in text
    assert "is at work" not in text
    assert json_record(text)["failed"]


def linger(comm: Comm) -> None:
    """Let the others reach their next wait; messages to itself prevent a deadlock error."""
    for _ in range(20):
        comm.post_recv(comm.rank, 1, [((3,), torch.float32)])
        comm.isend(torch.zeros(3), comm.rank, 1)
        comm.recv(comm.rank, 1)
        comm.transport.backend.idle(0, "the others")


def call_all(comm: Comm, group: Comm, called: list[str]) -> None:
    """Call one operation after the other in a group of two, the second rank always first."""
    tensor = torch.zeros(3)
    for operation in ("recv", "exchange", "broadcast", "mean", "flush"):
        called.append(operation)
        if group.rank == 0:
            linger(comm)
        match operation:
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


def test_peers_of_every_operation_are_world_ranks() -> None:
    """The odd ranks of the world are a group; its rank 0, world rank 1, is late in every call."""
    records: dict[str, dict[str, Any]] = {}
    called: list[str] = []

    def work(comm: Comm) -> None:
        world = observed(comm)
        group = world.split(world.rank % 2, name="odd")
        if world.rank % 2 == 0:
            return

        def record() -> None:
            records[called[-1]] = json_record(world.flight.text())

        if group.rank:
            with observing(world, record):
                call_all(world, group, called)
        else:
            call_all(world, group, [])

    threads.run_ranks(4, work)
    collectives = ("exchange", "broadcast", "mean")
    peers = {operation: record["peers"] for operation, record in records.items()}
    assert peers == {"recv": "1", "flush": "1"} | dict.fromkeys(collectives, "1,3")
    for operation in collectives:
        assert " of odd" in records[operation]["what"]
        assert " with tag " in records[operation]["what"]


def test_a_split_is_a_wait() -> None:
    records: list[dict[str, Any]] = []

    def work(comm: Comm) -> None:
        if comm.rank:
            linger(comm)
            records.append(json_record(flights[0].text()))
        else:
            flights.append(comm.flight)
        comm.split(0)

    flights: list[FlightRecorder] = []
    threads.run_ranks(2, work)
    assert records[0]["peers"] == "0-1"
    assert "world" in records[0]["what"]


def test_output_that_fails_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under the log lets neither a record nor an abort fail."""
    attempts: list[str] = []

    class Full:
        def write(self, text: str) -> None:
            attempts.append(text)
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
    assert attempts[-2:] == ["flush", "flush"]
    assert "to stderr" in attempts[0]
    assert "rank 1" in attempts[-3]


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[FlightRecorder]:
    """Return a recorder that writes on SIGURG."""
    before = signal.getsignal(signal.SIGURG)
    flight = FlightRecorder("rank 2", 2)
    dump_stacks_on(signal.SIGURG)  # as every rank does before
    flight.dump_on_signal(signal.SIGURG)
    flight.set_folder(tmp_path / "flight")
    yield flight
    faulthandler.unregister(signal.SIGURG)
    signal.signal(signal.SIGURG, before)


def test_stacks_are_written_from_c_too(recorder: FlightRecorder) -> None:
    assert recorder.folder is not None
    os.kill(os.getpid(), signal.SIGURG)
    stacks = (recorder.folder / "rank-00002.stacks").read_text()
    assert "Current thread" in stacks
    assert "in test_stacks_are_written_from_c_too" in stacks
    record = (recorder.folder / "rank-00002.txt").read_text()
    assert ": SIGURG" in record.splitlines()[0]
    recorder.close()
    assert (recorder.folder / "rank-00002.stacks").exists(), "users may still read it"


def test_a_rank_without_a_signal_leaves_no_file(recorder: FlightRecorder) -> None:
    assert recorder.folder is not None
    assert (recorder.folder / "rank-00002.stacks").exists()
    recorder.close()
    assert not recorder.folder.exists()
