"""The measured timeline: whole JSON after every segment, complete, in order, on one clock."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.engine import trace
from dtrain.engine.clock_sync import ClockOffset, ClockSync
from dtrain.train import train
from tests import tiny
from tests.outcome import break_off


def run(**told: Any) -> RunConfig:
    return tiny.run(mesh__stages=2, objective__name="backprop", **{"trace": True, **told})


def trained(told: RunConfig, out: Path, count: int = 4) -> dict[str, Any]:
    return ranks(count, lambda comm: train(told, comm, out))[0]


def events(out: Path) -> list[dict[str, Any]]:
    return list(json.loads((out / trace.TRACE_FILE).read_text(encoding="utf-8")))


def tenths(event: dict[str, Any]) -> tuple[int, int]:
    """Return start and end in tenths of a microsecond, which is what is written."""
    return round(10 * event["ts"]), round(10 * event["ts"]) + round(10 * event["dur"])


def test_every_action_of_every_rank_is_there_once(tmp_path: Path) -> None:
    summary = trained(run(), tmp_path)
    found = events(tmp_path)
    spans = [each for each in found if each["ph"] == "X"]
    real = [each for each in spans if each["cat"] in "FBU" and each["pid"] < 2]
    count = Counter((each["pid"], each["tid"], each["cat"]) for each in real)
    assert {key[:2] for key in count} == {(r, s) for r in range(2) for s in range(2)}
    for replica in range(2):
        own = Counter(e["tid"] for e in real if e["pid"] == replica and e["name"].startswith("U"))
        assert own.total() == 3 * summary["updates"], "three blocks"
    # A rank does one thing after the other, and waits inside; a viewer drops what overlaps.
    for key in {(each["pid"], each["tid"]) for each in spans}:
        own = [tenths(each) for each in spans if (each["pid"], each["tid"]) == key]
        around: list[int] = []
        for start, end in sorted(own, key=lambda span: (span[0], -span[1])):
            while around and around[-1] <= start:
                around.pop()
            assert start <= end <= min(around, default=end)
            around.append(end)
    named = {each["args"]["name"] for each in found if each["name"] == "process_name"}
    assert named == {"replica 0", "replica 1", "plan, each action as long as its median"}


def test_messages_come_after_they_were_sent(tmp_path: Path) -> None:
    """What block 1 does with a micro-batch ends after block 0 has begun its forward."""
    trained(run(partition__blocks=2, micro_batches=2), tmp_path)
    spans = {
        (e["pid"], e["args"]["update"], e["name"]): e
        for e in events(tmp_path)
        if e["ph"] == "X" and e["cat"] in "FB"
    }
    pairs = 0
    for (pid, update, name), event in spans.items():
        if name.startswith("F1."):
            before = spans[pid, update, f"F0.{name[3:]}"]
            assert event["ts"] + event["dur"] > before["ts"]
            pairs += 1
    assert pairs > 20


def test_the_plan_lies_beside_it(tmp_path: Path) -> None:
    trained(run(epochs=1), tmp_path)
    found = [each for each in events(tmp_path) if each["ph"] == "X"]
    planned = [each for each in found if each["cat"].startswith("planned")]
    real = [each for each in found if each["cat"] in "FBU" and each["pid"] == 0]
    assert Counter(each["name"] for each in planned) == Counter(each["name"] for each in real)
    assert all(each["pid"] == 2 for each in planned)


def test_it_changes_nothing_and_costs_nothing_that_is_counted(tmp_path: Path) -> None:
    one, two = trained(run(), tmp_path / "on"), trained(run(trace=False), tmp_path / "off")
    for key in ("digest", "bytes_intra_node", "bytes_inter_node"):
        assert one[key] == two[key]
    assert not (tmp_path / "off" / trace.TRACE_FILE).exists()


def test_a_resumed_run_goes_on_after_what_is_there(tmp_path: Path) -> None:
    trained(run(), tmp_path)
    before = events(tmp_path)
    break_off(tmp_path, 4)
    trained(run(), tmp_path)
    after = events(tmp_path)
    assert after[: len(before)] == before
    later = [each["ts"] for each in after[len(before) :] if each["ph"] == "X"]
    assert later
    assert min(later) >= 0


def test_clocks_that_differ_are_found_out() -> None:
    """Each rank's clock is an hour ahead of the one before."""

    def work(comm: Comm) -> ClockOffset:
        ahead = 3600.0 * comm.rank
        return ClockSync(comm.dup(), lambda: time.perf_counter() + ahead).measure_offset()

    for rank, told in enumerate(ranks(3, work)):
        assert abs(told.offset - 3600.0 * rank) <= told.error + 1e-6
        assert told.error < 0.5
