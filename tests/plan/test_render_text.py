"""The drawing of a plan, character by character."""

from __future__ import annotations

from dtrain.schedules import SCHEDULES
from dtrain.schedules.actions import Point, Route
from dtrain.schedules.pipelined import Pipelined
from dtrain.schedules.render_text import timeline_text
from dtrain.schedules.verify import ScheduleReport, verify_schedule
from tests.witness.split import Split


def report(name: str, stages: int, *micro_batches: int) -> ScheduleReport:
    """Return the report of one replica, with one block per stage."""
    routes = [Route(Point(b, "F"), Point(b + 1, "F"), "activation") for b in range(stages - 1)]
    if name != "stream":
        routes += [Route(Point(b + 1, "B"), Point(b, "B"), "gradient") for b in range(stages - 1)]
    return verify_schedule(SCHEDULES[name](), range(stages), [micro_batches], routes)


def test_stream() -> None:
    assert timeline_text(report("stream", 3, 2, 2)) == (
        "stage 0 |0 a a 1 b U 0 a a 1 b U . .|\n"
        "stage 1 |. 0 a a 1 b U 0 a a 1 b U .|\n"
        "stage 2 |. . 0 a a 1 b U 0 a a 1 b U|\n"
        "0 1 2 ... forward, a b c ... backward of micro-batch 0, 1, 2 ... (modulo 10), "
        "U update, . idle\n"
        "14 units (F 1, B 2), bubble 14.3%, live micro-batches 1, staleness 0"
    )


def test_one_forward_one_backward() -> None:
    rows = timeline_text(report("1f1b", 3, 4), width=40).splitlines()
    assert rows[:3] == [
        "stage 0 |012....aa3bb.cc.dU|",
        "stage 1 |.01..aa2bb3cc.dU..|",
        "stage 2 |..0aa1bb2cc3dU....|",
    ]
    assert rows[-1].endswith("live micro-batches 3 2 1, staleness 0")


def test_a_timeline_that_fits_the_page() -> None:
    rows = timeline_text(report("1f1b", 8, 16)).splitlines()
    assert len(rows) == 10
    assert {len(row) for row in rows[:8]} == {10 + 69}
    assert all(len(row) <= 120 for row in rows)
    assert rows[7].startswith("stage 7 |.......0aa1bb2cc")


def test_a_timeline_that_is_cut() -> None:
    rows = timeline_text(report("stream", 12, 60)).splitlines()
    assert rows[0].startswith("stage  0 |0aa1bb2cc")
    assert all(len(row) == 120 and row.endswith("…|") for row in rows[:12])


def test_a_segment_without_samples() -> None:
    assert timeline_text(report("1f1b", 2, 0)).splitlines()[0] == "stage 0 |U|"


def test_a_split_backward() -> None:
    routes = [Route(Point(0, "F"), Point(1, "F"), "activation")]
    routes += [Route(Point(1, "B"), Point(0, "B"), "gradient")]
    rows = timeline_text(verify_schedule(Split(), range(2), [[2]], routes)).splitlines()
    assert rows == [
        "stage 0 |0 1 . a A b U|",
        "stage 1 |. 0 a 1 b A U|",
        "0 1 2 ... forward, a b c ... gradient of the input, A B C ... of the weights of "
        "micro-batch 0, 1, 2 ... (modulo 10), U update, . idle",
        "7 units (F 1, I 1, W 1), bubble 14.3%, live micro-batches 2, staleness 0",
    ]


def test_two_passes() -> None:
    routes = [Route(Point(0, "F"), Point(0, "F", 1), "error")]
    rows = timeline_text(verify_schedule(Pipelined(), (0,), [[1, 1]], routes)).splitlines()
    assert rows[0] == "stage 0 |0 k a U 1 l b U|"
    assert "k l m ... further forwards of update" in rows[1]
