"""The flight recorder: what is kept, what is told, and that recording costs next to nothing."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from dtrain.comm import threads
from dtrain.comm.comm import Comm
from dtrain.telemetry import LENGTH, Flight


def test_the_last_events_are_kept_in_order() -> None:
    flight = Flight()
    for number in range(LENGTH + 10):
        flight.note("action", number)
    lines = [line.split()[1:] for line in flight.text().splitlines() if "action" in line]
    assert lines == [["action", str(number)] for number in range(10, LENGTH + 10)]


def test_words_are_made_where_somebody_asks() -> None:
    """An event costs a tuple: what it is about is asked for its words only by `text`."""
    asked: list[int] = []

    class Fact:
        def __str__(self) -> str:
            asked.append(1)
            return "F3.0"

    flight = Flight()
    flight.note("action", Fact(), "took", 0.25)
    assert not asked
    assert "action    F3.0 took 0.250000 s" in flight.text()
    assert asked


def test_an_event_is_cheap() -> None:
    """Under a microsecond on a quiet machine; the best of many, with room for a busy one."""
    flight, best = Flight(), 1.0
    for _ in range(50):
        start = time.perf_counter()
        for number in range(200):
            flight.note("action", number, "update", 17)
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 3e-6


def test_ages_waits_and_stacks_are_told() -> None:
    flight = Flight("rank 3 of 4 on n1", 3)
    now = time.perf_counter()
    flight.waits += [(now - 5, "the outer thing"), (now - 2, "the inner thing")]
    flight.sources.append(lambda: [(now - 1, "send b"), (now - 4, "receive a")])
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
    flight = Flight("rank 12", 12)
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
    flight = Flight("rank 1")
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
        ring.expect((comm.rank + 1) % 3, 2, [((4,), torch.int64)])
        try:
            ring.recv((comm.rank + 1) % 3, 2)
        finally:
            texts[comm.rank] = comm.flight.text()

    with pytest.raises(RuntimeError, match="deadlock"):
        threads.run(3, work, hosts=["a", "b", "c"])
    for rank, text in texts.items():
        peer = (rank + 1) % 3
        assert f"for (4,) int64 from rank {peer} with tag 2" in text
        place = f"rank {peer} of ring (world rank {peer} on {'abc'[peer]}) with tag 2"
        assert f"receive (4,) int64 from {place}" in text
