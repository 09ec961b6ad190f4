"""Unusual schedules: proved on many shapes, with the bubbles of their papers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dtrain.errors import ConfigError
from dtrain.schedules import SCHEDULES
from dtrain.schedules.actions import SPLIT_KINDS, UNSPLIT_KINDS
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.schedules.base import Schedule
from dtrain.schedules.cost_model import BlockCost, CostModel
from dtrain.schedules.forecast import forecast
from dtrain.schedules.pipelined import Pipelined
from dtrain.schedules.stream import Stream
from dtrain.schedules.stream_replay import StreamReplay
from dtrain.schedules.verify import ScheduleReport, verify_schedule
from tests.plan.test_cyclic import broadcast, codes, lagged, two_passes
from tests.plan.test_schedules import LAYOUTS, MICRO_BATCHES, Routing, backprop
from tests.refusals import refuses
from tests.witness.split import Split

WITNESSES: list[Schedule] = [Split(), Pipelined()]
SHAPES = [*LAYOUTS, (8, 4), (10, 4), (9, 3), (12, 3), (16, 2), (6, 5)]
UNEVEN = [*MICRO_BATCHES, [[5, 3, 4]], [[9, 1]], [[1] * 9 + [0]]]

every_witness = pytest.mark.parametrize("schedule", WITNESSES, ids=lambda s: type(s).__name__)


def prove(
    schedule: Schedule, blocks: int, stages: int, micro_batches: Sequence[Sequence[int]]
) -> ScheduleReport:
    """Return the report of a schedule under backpropagation, on its own placement."""
    if isinstance(schedule, Pipelined):
        micro_batches = [[min(count, 1) for count in counts] for counts in micro_batches]
    place = schedule.assign_stages([1] * blocks, stages)
    assert set(place) == set(range(stages))
    return verify_schedule(schedule, place, micro_batches, backprop(blocks))


@pytest.mark.parametrize("micro_batches", UNEVEN, ids=str)
@every_witness
def test_witnesses_are_proved(schedule: Schedule, micro_batches: list[list[int]]) -> None:
    for blocks, stages in SHAPES:
        report = prove(schedule, blocks, stages, micro_batches)
        if not schedule.asynchronous:
            assert report.staleness == (0,) * stages


@pytest.mark.parametrize("schedule", [Split(), *(kind() for kind in SCHEDULES.values())])
def test_class_attributes_describe_the_plans(schedule: Schedule) -> None:
    place = schedule.assign_stages([1] * 6, 3)
    micro_batches = [1, 1] if isinstance(schedule, AsyncSchedule) else [6, 5]
    streams = isinstance(schedule, Stream | StreamReplay)
    routes = backprop(6)[:5] if streams else backprop(6)
    plans = [list(schedule.plan(stage, place, micro_batches, routes)) for stage in range(3)]
    kinds = {action.kind for plan in plans for action in plan}
    assert kinds == set(SPLIT_KINDS if schedule.splits_backward else UNSPLIT_KINDS)
    texts = ("".join(a.kind for a in plan if a.update == u) for plan in plans for u in (0, 1))
    assert not schedule.flushes or all("U" not in text.rstrip("U") for text in texts)


@every_witness
def test_too_many_stages_are_refused(schedule: Schedule) -> None:
    with refuses(ConfigError, "partition.stages-out-of-range"):
        schedule.assign_stages([1, 1, 1], 4)


@pytest.mark.parametrize(
    ("stages", "micros", "bubble"), [(4, 8, 0.111), (4, 16, 0.059), (8, 16, 0.127), (8, 32, 0.068)]
)
@pytest.mark.parametrize("times", [(1, 1, 1), (1, 1.5, 0.5), (1, 1.2, 0.8)])
def test_a_split_backward_fills_the_bubble(
    stages: int, micros: int, bubble: float, times: tuple[float, float, float]
) -> None:
    """ZB-H1: an idle time of (P-1)(F+I-W), with the live micro-batches of 1F1B's first rank."""
    costs = CostModel((BlockCost(*times, live_bytes=9),) * stages)
    result = forecast(Split(), range(stages), [[micros]], backprop(stages), costs)
    idle_s = (stages - 1) * (times[0] + times[1] - times[2])
    assert result.makespan_s - micros * sum(times) == pytest.approx(idle_s)
    assert result.live_bytes == (9 * stages,) * stages
    report = prove(Split(), stages, stages, [[micros]])
    assert report.peak_live == (stages,) * stages
    assert round(report.bubble, 3) == bubble


@pytest.mark.parametrize("routes", [broadcast, two_passes, codes, lagged])
def test_cyclic_orders_run_any_routes(routes: Routing) -> None:
    for blocks, stages in SHAPES:
        line = Pipelined().assign_stages([1] * blocks, stages)
        verify_schedule(Pipelined(), line, [[1] * 9, [1] * 8 + [0]], routes(blocks))
