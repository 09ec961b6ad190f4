"""Cyclic orders: delays follow from the routes alone, on any placement of the blocks."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import product
from typing import Literal

import pytest

from dtrain.errors import ConfigError
from dtrain.partition import assign_stages
from dtrain.schedules.actions import Action, Point, Route
from dtrain.schedules.cyclic import cyclic_order, feeds_back
from dtrain.schedules.messages import MessageTable, count_forward_passes
from dtrain.schedules.stream import Stream
from dtrain.schedules.verify import PlanError, ScheduleReport, verify_plans, verify_schedule
from tests.harness import pairwise
from tests.plan.test_schedules import LAYOUTS, Routing, backprop, local
from tests.refusals import refuses

Drain = Literal["segment", "update"]


def broadcast(blocks: int) -> list[Route]:
    """Return the routes of an error that flows from the last `F` to the `B` of all other blocks."""
    last = Point(blocks - 1, "F")
    return local(blocks) + [Route(last, Point(b, "B"), "error") for b in range(blocks - 1)]


def two_passes(blocks: int) -> list[Route]:
    """Return the routes of two forward passes, the second with the error of the first (PEPITA)."""
    second_pass = [
        Route(Point(b, "F", 1), Point(b + 1, "F", 1), "second") for b in range(blocks - 1)
    ]
    return [*local(blocks), *second_pass, Route(Point(blocks - 1, "F"), Point(0, "F", 1), "error")]


def codes(blocks: int) -> list[Route]:
    """Return the routes of codes that each update sends back to the next one (CCL)."""
    backward = (Route(Point(b + 1, "B"), Point(b, "B"), "code", 1, True) for b in range(blocks - 1))
    return local(blocks) + list(backward)


def lagged(blocks: int) -> list[Route]:
    """Return the routes of gradients that are one update late, micro-batch by micro-batch."""
    return local(blocks) + [r._replace(lag=1) for r in backprop(blocks)[blocks - 1 :]]


def updated_weights(blocks: int) -> list[Route]:
    """Return the routes of weights that a block sends on as soon as it has been updated."""
    return local(blocks) + [Route(Point(b, "U"), Point(b + 1, "U"), "w") for b in range(blocks - 1)]


def refreshed(blocks: int) -> list[Route]:
    """Return the routes of weights of the last block that every other update sends to all others,
    late enough for a stream."""
    last = Point(blocks - 1, "U")
    return local(blocks) + [
        Route(last, Point(b, "U"), "w", blocks - b, every=2) for b in range(blocks - 1)
    ]


ROUTINGS = [local, backprop, broadcast, two_passes, codes, lagged, updated_weights, refreshed]
MICRO_BATCHES = [[1] * 6, [3, 3, 3], [2, 2, 1], [0, 1, 1, 0], [3, 0, 2, 1], [0]]


def prove(
    place: tuple[int, ...],
    micro_batches: list[int],
    routes: list[Route],
    drain: Drain = "segment",
) -> ScheduleReport:
    """Return the report of the cyclic order of one replica."""
    stages = range(max(place) + 1)
    plans = [tuple(cyclic_order(s, place, micro_batches, routes, drain)) for s in stages]
    return verify_plans([plans], place, routes)


def staleness(routes: list[Route], blocks: int, drain: Drain = "segment") -> tuple[int, ...]:
    """Return the staleness of all blocks, with one micro-batch per update."""
    return prove(tuple(range(blocks)), [1] * (4 * blocks), routes, drain).staleness


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8])
def test_delays_count_blocks(blocks: int) -> None:
    last = blocks - 1
    assert staleness(local(blocks), blocks) == (0,) * blocks
    assert staleness(backprop(blocks), blocks) == tuple(2 * (last - b) for b in range(blocks))
    # The error of the last block needs no hop to itself.
    delays = tuple(blocks - b if b < last else 0 for b in range(blocks))
    assert staleness(broadcast(blocks), blocks) == delays
    assert staleness(two_passes(blocks), blocks) == ((blocks if blocks > 1 else 0),) * blocks


@pytest.mark.parametrize("routing", ROUTINGS)
def test_nothing_is_stale_where_updates_drain(routing: Routing) -> None:
    assert staleness(routing(4), 4, "update") == (0,) * 4


@pytest.mark.parametrize(
    ("routing", "number", "drain"),
    pairwise([*product(ROUTINGS, range(len(MICRO_BATCHES)), ("segment", "update"))]),
)
def test_plans_are_proved_and_do_not_depend_on_the_place(
    routing: Routing, number: int, drain: Drain
) -> None:
    micro_batches = MICRO_BATCHES[number]
    for blocks in (1, 2, 3, 7):
        routes, one_rank = routing(blocks), (0,) * blocks
        places = {assign_stages([1] * blocks, stages) for b, stages in LAYOUTS if b == blocks}
        fold = (*range(-(-blocks // 2)), *reversed(range(blocks // 2)))
        expected = block_orders(one_rank, micro_batches, routes, drain)
        for place in {one_rank, tuple(range(blocks)), fold} | places:
            prove(place, micro_batches, routes, drain)
            assert block_orders(place, micro_batches, routes, drain) == expected


def block_orders(
    place: tuple[int, ...], micro_batches: list[int], routes: list[Route], drain: Drain
) -> dict[int, list[Action]]:
    """Return the actions of each block, in order."""
    orders = defaultdict(list)
    for stage in range(max(place) + 1):
        for action in cyclic_order(stage, place, micro_batches, routes, drain):
            orders[action.block].append(action)
    return orders


@pytest.mark.parametrize("routing", ROUTINGS)
def test_all_backwards_run_before_a_drained_update(routing: Routing) -> None:
    plan = list(cyclic_order(0, (0, 0, 0, 0), [3, 2, 0], routing(4), "update"))
    kinds = ["".join(a.kind for a in plan if a.update == update) for update in range(3)]
    assert all(text.endswith("UUUU") and text.count("U") == 4 for text in kinds)


def test_replicas_with_different_micro_batches_update_in_one_order() -> None:
    """A replica without samples idles in the cycles in which others have some."""
    for micro_batches in ([1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]):
        plan = cyclic_order(0, (0, 0, 0), micro_batches, backprop(3))
        assert " ".join(f"{a}@{a.update}" for a in plan if a.kind == "U") == (
            "U2@0 U1@0 U2@1 U0@0 U1@1 U2@2 U0@1 U1@2 U2@3 U0@2 U1@3 U0@3"
        )


def test_a_circle_is_refused_with_the_least_lag() -> None:
    code = Route(Point(2, "B"), Point(0, "F"), "code")

    def least_lag(
        place: tuple[int, ...], micro_batches: list[int], route: Route, drain: Drain = "segment"
    ) -> int:
        with refuses(ConfigError, "schedule.routes-form-circle") as caught:
            prove(place, micro_batches, [*local(3), route], drain)
        assert str(route) in caught.value.message
        return int(re.findall(r"lag = (\d+)", caught.value.message)[-1])

    assert least_lag((0, 1, 2), [3] * 4, code) == 1
    assert least_lag((0, 1, 2), [1] * 9, code) == 3
    assert least_lag((0, 0, 0), [1] * 9, code._replace(lag=2)) == 3
    routes = [*local(3), code._replace(lag=3)]
    assert prove((0, 1, 2), [1] * 9, routes).staleness == (0, 0, 0)
    assert least_lag((0, 1, 2), [1] * 9, code, "update") == 1
    prove((0, 1, 2), [1] * 9, [*local(3), code._replace(lag=1)], "update")


def test_feedback_is_recognised() -> None:
    assert [feeds_back(routing(3)) for routing in ROUTINGS] == [False, *[True] * 7]
    assert feeds_back([Route(Point(0, "B"), Point(1, "F"), "updated")])
    assert not feeds_back([Route(Point(1, "F"), Point(1, "F", 1), "own")])


def test_passes_are_counted_from_the_routes() -> None:
    assert [count_forward_passes(routes) for routes in ([], local(3), two_passes(3))] == [1, 1, 2]


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        (Route(Point(1, "B"), Point(0, "B"), "g", 1), "1.0<0.0 1.1<0.1 2.0<1.0"),
        (Route(Point(1, "B"), Point(0, "B"), "g", 2), "2.0<0.0 4.0<2.0"),
        (Route(Point(1, "B"), Point(0, "B"), "g", 9), ""),
        (Route(Point(0, "F"), Point(1, "B"), "s", 0, True), "0.0<0.0 1.0<1.0 2.0<2.0 4.0<4.0"),
        (Route(Point(1, "B"), Point(0, "B"), "g", 1, True), "1.0<0.0 2.0<1.0"),
        (Route(Point(1, "U"), Point(0, "F"), "w", 2), "2.0<0.-1 4.0<2.-1"),
        (Route(Point(0, "F"), Point(1, "U"), "f"), "0.-1<0.0 1.-1<1.0 2.-1<2.0 4.-1<4.0"),
        (Route(Point(0, "U"), Point(1, "U"), "w", 3), "3.-1<0.-1 4.-1<1.-1"),
        (Route(Point(0, "U"), Point(1, "U"), "w", 1, every=2), "1.-1<0.-1 3.-1<2.-1"),
        (Route(Point(1, "U"), Point(0, "U"), "w", 2, every=3), "2.-1<0.-1"),
    ],
)
def test_messages_exist_if_both_ends_do(route: Route, expected: str) -> None:
    micro_batches, place, routes = [2, 2, 1, 0, 1], (0, 1), [*local(2), route]
    sent, received = [], []
    for stage in (0, 1):
        messages = MessageTable(routes, place, stage, micro_batches)
        for action in cyclic_order(stage, place, micro_batches, routes):
            if 1 in messages.incoming(action):
                update, micro = messages.source_micro_batch(1, action)
                received.append(f"{action.update}.{action.micro}<{update}.{micro}")
            if 1 in messages.outgoing(action):
                sent.append(f"{action.update}.{action.micro}")
    assert " ".join(received) == expected
    assert sent == [message.partition("<")[2] for message in received]
    prove(place, micro_batches, routes)


def test_the_first_half_of_a_split_backward_has_all_its_routes() -> None:
    messages = MessageTable(backprop(2), (0, 0), 0, [1])
    assert messages.outgoing(Action("I", 1, 0, 0)) == (1,)
    assert messages.incoming(Action("I", 0, 0, 0)) == (1,)
    assert messages.outgoing(Action("W", 1, 0, 0)) == ()
    assert messages.incoming(Action("W", 0, 0, 0)) == ()


def test_a_lag_needs_a_larger_window() -> None:
    """All messages that are sent before the first is received need a posted receive."""
    routes, micro_batches = lagged(2), [4, 4, 2]
    messages = MessageTable(routes, (0, 1), 0, micro_batches)
    assert [messages.window(r) for r in (0, 1)] == [1, 5]
    once = [route._replace(once=True) for route in routes]
    assert MessageTable(once, (0, 1), 0, micro_batches).window(1) == 2
    prove((0, 1), micro_batches, routes)
    rare = [route._replace(once=True, lag=5, every=2) for route in routes]
    assert MessageTable(rare, (0, 1), 0, micro_batches).window(1) == 4


def test_a_long_period_costs_no_longer_proof() -> None:
    routes, sizes = refreshed(3), [[2] * 4000]
    one, other = (
        verify_schedule(Stream(), (0, 1, 2), sizes, [r._replace(every=every) for r in routes])
        for every in (4, 10**6)
    )
    assert one == other


def test_a_window_of_one_deadlocks_under_a_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MessageTable, "window", lambda self, route: 1)
    with pytest.raises(PlanError) as caught:
        prove((0, 1), [4, 4, 4], lagged(2))
    assert caught.value.key == "plan.deadlock"


def test_many_blocks_are_ordered_in_time() -> None:
    plan = list(cyclic_order(0, (0,) * 256, [1] * 4, backprop(256)))
    assert len(plan) == 4 * 3 * 256
