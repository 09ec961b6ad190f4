"""Awkward schedules hold the seams: proved on many shapes, and as idle as their papers say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dtrain.errors import DtrainError
from dtrain.schedules import SCHEDULES
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.schedules.base import Schedule
from dtrain.schedules.cost_model import BlockCost, CostModel
from dtrain.schedules.forecast import forecast
from dtrain.schedules.pipelined import Pipelined
from dtrain.schedules.verify import ScheduleReport, verify_schedule
from tests.plan.test_cyclic import broadcast, codes, lagged, two_passes
from tests.plan.test_schedules import LAYOUTS, MICRO_BATCHES, Routing, backprop
from tests.witness.fold import Fold
from tests.witness.interleaved import Interleaved
from tests.witness.split import Split

WITNESSES: list[Schedule] = [Interleaved(), Fold(), Split(), Pipelined()]
SHAPES = [*LAYOUTS, (8, 4), (10, 4), (9, 3), (12, 3), (16, 2), (6, 5)]
UNEVEN = [*MICRO_BATCHES, [[5, 3, 4]], [[9, 1]], [[1] * 9 + [0]]]

every = pytest.mark.parametrize("schedule", WITNESSES, ids=lambda s: type(s).__name__)


def prove(
    schedule: Schedule, blocks: int, stages: int, sizes: Sequence[Sequence[int]]
) -> ScheduleReport:
    """Return the proof of a schedule over the routes of backpropagation, on its own place."""
    if isinstance(schedule, Pipelined):
        sizes = [[min(size, 1) for size in row] for row in sizes]
    where = schedule.assign_stages([1] * blocks, stages)
    assert set(where) == set(range(stages))
    return verify_schedule(schedule, where, sizes, backprop(blocks))


@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
@every
def test_witnesses_are_proved(schedule: Schedule, sizes: list[list[int]]) -> None:
    for blocks, stages in SHAPES:
        report = prove(schedule, blocks, stages, sizes)
        if not schedule.asynchronous:
            assert report.staleness == (0,) * stages


@pytest.mark.parametrize("schedule", [*WITNESSES[:-1], *(kind() for kind in SCHEDULES.values())])
def test_schedules_say_what_their_plans_are(schedule: Schedule) -> None:
    where = schedule.assign_stages([1] * 6, 3)
    sizes = [1, 1] if isinstance(schedule, AsyncSchedule) else [6, 5]
    routes = backprop(6) if type(schedule) is not SCHEDULES["stream"] else backprop(6)[:5]
    plans = [list(schedule.plan(stage, where, sizes, routes)) for stage in range(3)]
    kinds = {action.kind for plan in plans for action in plan}
    assert kinds == set("FIWU" if schedule.splits_backward else "FBU")
    texts = ("".join(a.kind for a in plan if a.update == u) for plan in plans for u in (0, 1))
    assert not schedule.flushes or all("U" not in text.rstrip("U") for text in texts)


@every
def test_too_many_stages_are_refused(schedule: Schedule) -> None:
    with pytest.raises(DtrainError, match="3 blocks cannot fill 4 stages"):
        schedule.assign_stages([1, 1, 1], 4)


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize(("stages", "micros"), [(4, 8), (4, 16), (8, 16), (8, 32)])
@pytest.mark.parametrize("shares", [(1, 1, 1), (1, 1.5, 0.5)])
def test_interleaving_divides_the_bubble(
    stages: int, micros: int, chunks: int, shares: tuple[float, float, float]
) -> None:
    blocks, price = stages * chunks, BlockCost(*(share / chunks for share in shares), live_bytes=1)
    where, costs = Interleaved().assign_stages([1] * blocks, stages), CostModel((price,) * blocks)
    told = forecast(Interleaved(), where, [[micros]], backprop(blocks), costs)
    assert told.makespan_s - 3 * micros == pytest.approx(3 * (stages - 1) / chunks)
    assert told.bubble == pytest.approx((stages - 1) / (chunks * micros + stages - 1))
    ahead = [2 * (stages - 1 - s) + (chunks - 1) * stages + 1 for s in range(stages)]
    assert told.live_bytes == tuple(ahead)


@pytest.mark.parametrize(
    ("stages", "micros", "share"), [(4, 8, 0.111), (4, 16, 0.059), (8, 16, 0.127), (8, 32, 0.068)]
)
@pytest.mark.parametrize("shares", [(1, 1, 1), (1, 1.5, 0.5), (1, 1.2, 0.8)])
def test_a_split_backward_fills_the_bubble(
    stages: int, micros: int, share: float, shares: tuple[float, float, float]
) -> None:
    """ZB-H1: (P-1)(F+I-W), as live as one-forward-one-backward on the first rank."""
    costs = CostModel((BlockCost(*shares, live_bytes=9),) * stages)
    told = forecast(Split(), range(stages), [[micros]], backprop(stages), costs)
    bubble = (stages - 1) * (shares[0] + shares[1] - shares[2])
    assert told.makespan_s - micros * sum(shares) == pytest.approx(bubble)
    assert told.live_bytes == (9 * stages,) * stages
    report = prove(Split(), stages, stages, [[micros]])
    assert report.peak_live == (stages,) * stages
    assert round(report.bubble, 3) == share


@pytest.mark.parametrize("routes", [broadcast, two_passes, codes, lagged])
def test_cycles_run_whatever_flows(routes: Routing) -> None:
    for blocks, stages in SHAPES:
        fold, line = (
            Fold().assign_stages([1] * blocks, stages),
            Pipelined().assign_stages([1] * blocks, stages),
        )
        verify_schedule(Fold(), fold, [[3, 3, 2], [3, 2, 2]], routes(blocks))
        verify_schedule(Pipelined(), line, [[1] * 9, [1] * 8 + [0]], routes(blocks))
