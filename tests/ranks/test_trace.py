"""The measured timeline: whole JSON after every segment, complete, in order, on one clock."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.engine import trace
from dtrain.engine.clock_sync import ClockOffset, ClockSync
from tests import tiny
from tests.harness import train_in_threads
from tests.outcome import break_off


def traced_run(**changes: Any) -> RunConfig:
    """Return a tiny run on two stages that writes its timeline."""
    fields = {"mesh__stages": 2, "objective__name": "backprop", "trace": True}
    return tiny.run(**(fields | changes))


def read_events(out: Path) -> list[dict[str, Any]]:
    return list(json.loads((out / trace.TRACE_FILE).read_text(encoding="utf-8")))


def tenths(event: dict[str, Any]) -> tuple[int, int]:
    """Return start and end in tenths of a microsecond, the resolution of the file."""
    return round(10 * event["ts"]), round(10 * event["ts"]) + round(10 * event["dur"])


def test_every_action_of_every_rank_is_there_once(tmp_path: Path) -> None:
    summary = train_in_threads(traced_run(), tmp_path, replicas=2)
    events = read_events(tmp_path)
    spans = [event for event in events if event["ph"] == "X"]
    actions = [event for event in spans if event["cat"] in "FBU" and event["pid"] < 2]
    count = Counter((event["pid"], event["tid"], event["cat"]) for event in actions)
    assert {key[:2] for key in count} == {(r, s) for r in range(2) for s in range(2)}
    for replica in range(2):
        updates = [e for e in actions if e["pid"] == replica and e["name"].startswith("U")]
        assert len(updates) == 3 * summary["updates"], "three blocks"
    # A rank does one thing after the other, and waits inside; a viewer drops spans that overlap.
    for key in {(event["pid"], event["tid"]) for event in spans}:
        times = [tenths(event) for event in spans if (event["pid"], event["tid"]) == key]
        open_ends: list[int] = []
        for start, end in sorted(times, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert start <= end <= min(open_ends, default=end)
            open_ends.append(end)
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"replica 0", "replica 1", "plan, each action as long as its median"}


def test_messages_come_after_they_were_sent(tmp_path: Path) -> None:
    """The forward of block 1 ends after that of block 0 on the same micro-batch has begun."""
    train_in_threads(traced_run(partition__blocks=2, micro_batches=2), tmp_path, replicas=2)
    spans = {
        (e["pid"], e["args"]["update"], e["name"]): e
        for e in read_events(tmp_path)
        if e["ph"] == "X" and e["cat"] in "FB"
    }
    pairs = 0
    for (pid, update, name), event in spans.items():
        if name.startswith("F1."):
            sender = spans[pid, update, f"F0.{name[3:]}"]
            assert event["ts"] + event["dur"] > sender["ts"]
            pairs += 1
    assert pairs > 20


def test_the_plan_lies_beside_it(tmp_path: Path) -> None:
    train_in_threads(traced_run(epochs=1), tmp_path, replicas=2)
    spans = [event for event in read_events(tmp_path) if event["ph"] == "X"]
    planned = [event for event in spans if event["cat"].startswith("planned")]
    measured = [event for event in spans if event["cat"] in "FBU" and event["pid"] == 0]
    planned_names = Counter(event["name"] for event in planned)
    assert planned_names == Counter(event["name"] for event in measured)
    assert all(event["pid"] == 2 for event in planned)


def test_it_changes_nothing_and_costs_nothing_that_is_counted(tmp_path: Path) -> None:
    traced = train_in_threads(traced_run(), tmp_path / "on", replicas=2)
    plain = train_in_threads(traced_run(trace=False), tmp_path / "off", replicas=2)
    for key in ("digest", "bytes_intra_node", "bytes_inter_node"):
        assert traced[key] == plain[key]
    assert not (tmp_path / "off" / trace.TRACE_FILE).exists()


def test_a_resumed_run_appends_to_the_timeline(tmp_path: Path) -> None:
    train_in_threads(traced_run(), tmp_path, replicas=2)
    before = read_events(tmp_path)
    break_off(tmp_path, 4)
    train_in_threads(traced_run(), tmp_path, replicas=2)
    after = read_events(tmp_path)
    assert after[: len(before)] == before
    later = [event["ts"] for event in after[len(before) :] if event["ph"] == "X"]
    assert later
    assert min(later) >= 0


def test_offsets_between_clocks_are_measured() -> None:
    """Each rank's clock is an hour ahead of the one before."""

    def measure_offset(comm: Comm) -> ClockOffset:
        ahead_s = 3600.0 * comm.rank
        return ClockSync(comm.dup(), lambda: time.perf_counter() + ahead_s).measure_offset()

    for rank, clock in enumerate(run_ranks(3, measure_offset)):
        assert abs(clock.offset - 3600.0 * rank) <= clock.error + 1e-6
        assert clock.error < 0.5
