"""Places: any stage of every block where the schedule can, refused where it cannot.

Invariant: a placement is proved with unequal replicas and uneven updates, under routes that go
forward, forward and back, and past blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from dtrain.errors import ConfigError
from dtrain.partition import check_places, is_ascending
from dtrain.schedules import SCHEDULES
from dtrain.schedules.actions import Point, Route
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.schedules.cost_model import BlockCost, CostModel
from dtrain.schedules.forecast import forecast
from dtrain.schedules.verify import verify_schedule
from tests.harness import some
from tests.plan.test_cyclic import broadcast, codes, lagged, two_passes
from tests.plan.test_schedules import LAYOUTS, MICRO_BATCHES, Routing, backprop, local
from tests.refusals import refuses


def skips(blocks: int) -> list[Route]:
    """Return the routes of backpropagation with skips past one block and past two."""
    routes = backprop(blocks)
    for length in (2, 3):
        for block in range(blocks - length):
            ends = block, block + length
            routes.append(Route(Point(ends[0], "F"), Point(ends[1], "F"), f"skip {ends}"))
            routes.append(Route(Point(ends[1], "B"), Point(ends[0], "B"), f"skip-gradient {ends}"))
    return routes


PLACES = [(0, 1, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 0, 0, 2, 1), (2, 1, 0), (0, 1, 2, 2, 1, 0)]
ONE_PLACEMENT = {
    "1f1b": "schedule.places-not-ascending",
    "interleaved": "schedule.places-no-loop",
}
"""Schedules that run one kind of placement, and the key of the refusal of others."""
FREE = [
    (name, routes)
    for name, routes in itertools.product(SCHEDULES, (local, backprop, skips))
    if name not in ONE_PLACEMENT and SCHEDULES[name]().supports_all(routes(6))
]
UNEVEN = [[[5, 5, 5, 2]], [[8, 8, 3], [8, 7, 0]], [[5, 5], [5, 4], [5, 5]]]


@pytest.mark.parametrize(("name", "routes"), FREE)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_any_places_are_proved(name: str, routes: Routing, place: tuple[int, ...]) -> None:
    schedule = SCHEDULES[name]()
    schedule.check_places(place)
    for micro_batches in some(UNEVEN, FREE.index((name, routes)) + PLACES.index(place)):
        counts: list[list[int]] = micro_batches
        if isinstance(schedule, AsyncSchedule):
            counts = [[min(count, 1) for count in row] for row in counts]
        report = verify_schedule(schedule, place, counts, routes(len(place)))
        assert schedule.asynchronous or set(report.staleness) == {0}


@pytest.mark.parametrize("name", ONE_PLACEMENT)
def test_a_schedule_refuses_places_that_it_cannot_run(name: str) -> None:
    schedule = SCHEDULES[name]()
    for blocks, stages in LAYOUTS:
        schedule.check_places(schedule.assign_stages([1] * blocks, stages))
    with refuses(ConfigError, ONE_PLACEMENT[name]):
        schedule.check_places((0, 1, 1, 0))


def test_the_places_of_1f1b_need_not_be_balanced() -> None:
    SCHEDULES["1f1b"]().check_places((0, 0, 0, 1))
    verify_schedule(SCHEDULES["1f1b"](), (0, 0, 0, 1), [[5, 3]], backprop(4))
    with refuses(ConfigError, "schedule.places-not-ascending"):
        SCHEDULES["1f1b"]().check_places((1, 0))


@pytest.mark.parametrize(
    ("places", "blocks", "stages", "key"),
    [
        ([0, 1, 1], 4, 2, "partition.places-count"),
        ([0, 1, 2, 0], 4, 2, "partition.place-out-of-range"),
        ([0, -1, 1, 0], 4, 2, "partition.place-out-of-range"),
        ([0, 2, 2, 0], 4, 3, "partition.stage-without-block"),
    ],
)
def test_places_fit_blocks_and_stages(
    places: Sequence[int], blocks: int, stages: int, key: str
) -> None:
    check_places([0, 1, 1, 0], 4, 2)
    with refuses(ConfigError, key):
        check_places(places, blocks, stages)


SHAPES = [*LAYOUTS, (8, 4), (10, 4), (9, 3), (12, 3), (16, 2), (6, 5)]
MANY_MICRO_BATCHES = [*MICRO_BATCHES, [[9, 1]], [[1] * 9 + [0]]]


@pytest.mark.parametrize("number", range(len(MANY_MICRO_BATCHES)))
@pytest.mark.parametrize("name", ["interleaved", "fold"])
def test_own_places_are_proved(name: str, number: int) -> None:
    schedule, micro_batches = SCHEDULES[name](), MANY_MICRO_BATCHES[number]
    for blocks, stages in some(SHAPES, number + (name == "fold"), 2):
        place = schedule.assign_stages([1] * blocks, stages)
        assert set(place) == set(range(stages))
        report = verify_schedule(schedule, place, micro_batches, backprop(blocks))
        assert report.staleness == (0,) * stages
    with refuses(ConfigError, "partition.stages-out-of-range"):
        schedule.assign_stages([1, 1, 1], 4)


@pytest.mark.parametrize("routes", [broadcast, two_passes, codes, lagged])
def test_a_fold_runs_any_routes(routes: Routing) -> None:
    schedule = SCHEDULES["fold"]()
    for blocks, stages in SHAPES:
        place = schedule.assign_stages([1] * blocks, stages)
        verify_schedule(schedule, place, [[3, 3, 2], [3, 2, 2]], routes(blocks))


def test_a_fold_is_a_v_and_a_loop_goes_round() -> None:
    assert SCHEDULES["fold"]().assign_stages([1] * 8, 4) == (0, 1, 2, 3, 3, 2, 1, 0)
    assert SCHEDULES["interleaved"]().assign_stages([1] * 8, 4) == (0, 1, 2, 3, 0, 1, 2, 3)
    assert is_ascending((0, 0, 1))
    assert not is_ascending((0, 1, 0))


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize(("stages", "micros"), [(4, 8), (4, 16), (8, 16), (8, 32)])
@pytest.mark.parametrize("times", [(1, 1, 1), (1, 1.5, 0.5)])
def test_interleaving_divides_the_bubble(
    stages: int, micros: int, rounds: int, times: tuple[float, float, float]
) -> None:
    """Narayanan 2021: a bubble of (P-1)/v; with one round it is 1F1B, live micro-batches too."""
    blocks = stages * rounds
    cost = BlockCost(*(time / rounds for time in times), live_bytes=1)
    schedule, routes = SCHEDULES["interleaved"](), backprop(blocks)
    place, costs = schedule.assign_stages([1] * blocks, stages), CostModel((cost,) * blocks)
    result = forecast(schedule, place, [[micros]], routes, costs)
    assert result.makespan_s - 3 * micros == pytest.approx(3 * (stages - 1) / rounds)
    assert result.bubble == pytest.approx((stages - 1) / (rounds * micros + stages - 1))
    live = [2 * (stages - 1 - s) + (rounds - 1) * stages + 1 for s in range(stages)]
    if rounds == 1:
        live = [stages - s for s in range(stages)]
    assert result.live_bytes == tuple(live)


@pytest.mark.parametrize(("stages", "micros"), [(2, 4), (4, 8), (4, 16), (8, 16), (8, 32)])
def test_a_fold_halves_the_bubble(stages: int, micros: int) -> None:
    schedule, blocks = SCHEDULES["fold"](), 2 * stages
    place = schedule.assign_stages([1] * blocks, stages)
    report = verify_schedule(schedule, place, [[micros, micros]], backprop(blocks))
    assert report.bubble == pytest.approx((stages - 1) / (2 * micros + stages - 1))
