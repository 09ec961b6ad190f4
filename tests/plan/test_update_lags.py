"""Lags of tied parameters: by hand, and as a law of the plans of all ranks."""

from __future__ import annotations

from itertools import combinations

import pytest

from dtrain.partition import assign_stages
from dtrain.schedules.base import Schedule
from dtrain.schedules.pipedream import PipeDream, PipeDream2BW
from dtrain.schedules.pipelined import Pipelined
from dtrain.schedules.update_lags import (
    KeptGradients,
    Term,
    UpdateCycles,
    peak_kept_gradients,
    tied_routes,
)
from dtrain.schedules.verify import PlanError, verify_plans, verify_schedule
from tests.plan.test_schedules import backprop, local

BY_HAND: list[tuple[Schedule, int, tuple[int, ...], tuple[int, ...]]] = [
    # block b of K is updated 2 (K - 1) - b cycles after its first micro-batch entered
    (Pipelined(), 2, (0, 1), (2, 0)),
    (Pipelined(), 3, (0, 2), (3, 0)),
    (Pipelined(), 4, (0, 3), (4, 0)),
    (Pipelined(), 5, (0, 4), (5, 0)),
    (Pipelined(), 5, (1, 2), (2, 0)),
    (Pipelined(), 5, (0, 2, 4), (5, 3, 0)),
    # the same distances, in updates of two cycles
    (PipeDream(), 2, (0, 1), (1, 0)),
    (PipeDream(), 3, (0, 2), (2, 0)),
    (PipeDream(), 4, (0, 3), (2, 0)),
    (PipeDream(), 5, (0, 4), (3, 0)),
    (PipeDream(), 5, (0, 2, 4), (3, 2, 0)),
    # an update is longer than the way through the pipeline
    (PipeDream2BW(), 2, (0, 1), (1, 0)),
    (PipeDream2BW(), 5, (0, 4), (1, 0)),
    (PipeDream2BW(), 5, (0, 2, 4), (1, 1, 0)),
]


@pytest.mark.parametrize(("schedule", "blocks", "holders", "lags"), BY_HAND)
def test_lags_by_hand(
    schedule: Schedule, blocks: int, holders: tuple[int, ...], lags: tuple[int, ...]
) -> None:
    assert cycles_of(schedule, blocks).lags(holders) == lags


def cycles_of(schedule: Schedule, blocks: int) -> UpdateCycles:
    """Return the cycles under backpropagation."""
    cycles = schedule.update_cycles(blocks, backprop(blocks))
    assert cycles is not None
    return cycles


def micro_batches(schedule: Schedule, blocks: int, updates: int) -> list[int]:
    """Return as many micro-batches per update as a schedule needs."""
    return [max(1, blocks - 1) if isinstance(schedule, PipeDream2BW) else 1] * updates


@pytest.mark.parametrize("schedule", [Pipelined(), PipeDream(), PipeDream2BW()])
@pytest.mark.parametrize("blocks", [2, 3, 4, 5])
def test_no_rank_waits_for_the_gradient_of_another_copy(schedule: Schedule, blocks: int) -> None:
    """On any placement: the plans end, without a credit, and take no longer than without ties."""
    cycles, routes = cycles_of(schedule, blocks), backprop(blocks)
    sizes = micro_batches(schedule, blocks, 3 * blocks)
    places = {assign_stages([1] * blocks, stages) for stages in range(1, blocks + 1)}
    for place in places | {(*range(-(-blocks // 2)), *reversed(range(blocks // 2)))}:
        plans = [tuple(schedule.plan(s, place, sizes, routes)) for s in range(max(place) + 1)]
        makespan = verify_plans([plans], place, routes).makespan
        for holders in (*combinations(range(blocks), 2), tuple(range(blocks))):
            tied = tied_routes(holders, place, cycles)
            assert verify_plans([plans], place, [*routes, *tied]).makespan == makespan
    unequal = [sizes, [*sizes[:-1], 0]]
    tied = list(tied_routes((0, blocks - 1), range(blocks), cycles))
    verify_schedule(schedule, range(blocks), unequal, routes, tied)


def test_without_lags_the_plans_would_wait_for_each_other() -> None:
    tied = [route._replace(lag=0) for route in tied_routes((0, 2), range(3), None)]
    with pytest.raises(PlanError) as caught:
        verify_schedule(Pipelined(), range(3), [[1] * 9], backprop(3), tied)
    assert caught.value.key == "plan.deadlock"


def test_orders_that_depend_on_the_ranks_have_no_cycles() -> None:
    assert Pipelined().update_cycles(3, local(3)) is None


@pytest.mark.parametrize("local_copies", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_every_gradient_is_added_once_by_every_copy(local_copies: tuple[int, ...]) -> None:
    """Also where a rank has several copies, and a segment is shorter than the lags."""
    cycles = cycles_of(Pipelined(), 3)
    for updates in (1, 2, 7):
        lags = cycles.lags((0, 1, 2))
        kept = KeptGradients[Term](lags, len(local_copies))
        steps = sorted(
            ((copy, update) for copy in local_copies for update in range(updates)),
            key=lambda step: cycles.cycle(*step),
        )
        received: list[Term] = []
        added: dict[int, list[Term]] = {copy: [] for copy in local_copies}

        def receive(term: Term, received: list[Term] = received) -> Term:
            received.append(term)
            return term

        for copy, update in steps:
            terms = kept.step(copy, update, Term(copy, update), receive)
            assert terms == [Term(c, update - lag) for c, lag in enumerate(lags) if update >= lag]
            added[copy] += terms
        left = [kept.pop(term, receive) for term in kept.remaining(updates)]
        everything = {Term(copy, update) for copy in range(3) for update in range(updates)}
        for terms in added.values():
            assert sorted([*terms, *left]) == sorted(everything)
        assert sorted(received) == sorted(t for t in everything if t.copy not in local_copies)


@pytest.mark.parametrize(("place", "expected"), [((0, 1, 2), [3, 0, 0]), ((0, 0, 0), [5])])
def test_the_most_gradients_that_are_kept(place: tuple[int, ...], expected: list[int]) -> None:
    """Block 0 keeps those of its lag; one rank also those of block 2, until block 0 adds them."""
    cycles, holders = cycles_of(Pipelined(), 3), (0, 2)
    peaks = [
        peak_kept_gradients(
            list(Pipelined().plan(stage, place, [1] * 12, backprop(3))),
            holders,
            cycles.lags(holders),
        )
        for stage in range(max(place) + 1)
    ]
    assert peaks == expected
