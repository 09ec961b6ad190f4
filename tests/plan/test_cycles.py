"""Cycles: delays follow from the routes alone, and no place of the blocks moves them."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import pytest

from dtrain.errors import DtrainError
from dtrain.partition import assign_stages
from dtrain.schedules.actions import Action, Point, Route
from dtrain.schedules.cyclic import cyclic_order, feeds_back
from dtrain.schedules.messages import MessageTable, count_forward_passes
from dtrain.schedules.verify import PlanError, ScheduleReport, verify_plans
from tests.plan.test_schedules import LAYOUTS, Routing, backprop, local

Drain = Literal["segment", "update"]


def broadcast(blocks: int) -> list[Route]:
    """Return the routes of an error that goes from the last forward to every earlier learning."""
    last = Point(blocks - 1, "F")
    return local(blocks) + [Route(last, Point(b, "B"), "error") for b in range(blocks - 1)]


def twice(blocks: int) -> list[Route]:
    """Return the routes of two passes, the second with the error of the first (PEPITA)."""
    again = [Route(Point(b, "F", 1), Point(b + 1, "F", 1), "again") for b in range(blocks - 1)]
    return [*local(blocks), *again, Route(Point(blocks - 1, "F"), Point(0, "F", 1), "error")]


def codes(blocks: int) -> list[Route]:
    """Return the routes of codes that each update hands back to the next one."""
    down = (Route(Point(b + 1, "B"), Point(b, "B"), "code", 1, True) for b in range(blocks - 1))
    return local(blocks) + list(down)


def lagged(blocks: int) -> list[Route]:
    """Return the routes of gradients that come an update late, micro-batch by micro-batch."""
    return local(blocks) + [r._replace(lag=1) for r in backprop(blocks)[blocks - 1 :]]


def settled(blocks: int) -> list[Route]:
    """Return the routes of weights that are handed on as soon as a block has been updated."""
    return local(blocks) + [Route(Point(b, "U"), Point(b + 1, "U"), "w") for b in range(blocks - 1)]


ROUTINGS = [local, backprop, broadcast, twice, codes, lagged, settled]
SIZES = [[1] * 6, [3, 3, 3], [2, 2, 1], [0, 1, 1, 0], [3, 0, 2, 1], [0]]


def prove(
    where: tuple[int, ...], sizes: list[int], routes: list[Route], drain: Drain = "segment"
) -> ScheduleReport:
    stages = range(max(where) + 1)
    return verify_plans(
        [[tuple(cyclic_order(s, where, sizes, routes, drain)) for s in stages]], where, routes
    )


def staleness(routes: list[Route], blocks: int, drain: Drain = "segment") -> tuple[int, ...]:
    """Return the updates between forward and learning, an update after each micro-batch."""
    return prove(tuple(range(blocks)), [1] * (4 * blocks), routes, drain).staleness


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8])
def test_delays_count_blocks(blocks: int) -> None:
    own, last = range(blocks), blocks - 1
    assert staleness(local(blocks), blocks) == (0,) * blocks
    assert staleness(backprop(blocks), blocks) == tuple(2 * (last - b) for b in own)
    # The error of the last block needs no hop to itself.
    assert staleness(broadcast(blocks), blocks) == tuple(blocks - b if b < last else 0 for b in own)
    assert staleness(twice(blocks), blocks) == ((blocks if blocks > 1 else 0),) * blocks


@pytest.mark.parametrize("routing", ROUTINGS)
def test_nothing_is_stale_where_updates_drain(routing: Routing) -> None:
    assert staleness(routing(4), 4, "update") == (0,) * 4


@pytest.mark.parametrize("drain", ["segment", "update"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_plans_are_proved_and_places_change_nothing(
    routing: Routing, sizes: list[int], drain: Drain
) -> None:
    for blocks in (1, 2, 3, 7):
        routes = routing(blocks)
        places = {assign_stages([1] * blocks, stages) for b, stages in LAYOUTS if b == blocks}
        fold = (*range(-(-blocks // 2)), *reversed(range(blocks // 2)))
        for where in {(0,) * blocks, tuple(range(blocks)), fold} | places:
            prove(where, sizes, routes, drain)
            assert orders(where, sizes, routes, drain) == orders(
                (0,) * blocks, sizes, routes, drain
            )


def orders(
    where: tuple[int, ...], sizes: list[int], routes: list[Route], drain: Drain
) -> dict[int, list[Action]]:
    """Return what each block does, in order."""
    found = defaultdict(list)
    for stage in range(max(where) + 1):
        for action in cyclic_order(stage, where, sizes, routes, drain):
            found[action.block].append(action)
    return found


@pytest.mark.parametrize("routing", ROUTINGS)
def test_all_have_learnt_before_a_drained_update(routing: Routing) -> None:
    plan = list(cyclic_order(0, (0, 0, 0, 0), [3, 2, 0], routing(4), "update"))
    kinds = ["".join(a.kind for a in plan if a.update == update) for update in range(3)]
    assert all(text.endswith("UUUU") and text.count("U") == 4 for text in kinds)


def test_replicas_of_other_sizes_update_in_one_order() -> None:
    """A replica without samples waits in the cycles of those that have some."""
    for sizes in ([1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]):
        plan = cyclic_order(0, (0, 0, 0), sizes, backprop(3))
        assert " ".join(f"{a}@{a.update}" for a in plan if a.kind == "U") == (
            "U2@0 U1@0 U2@1 U0@0 U1@1 U2@2 U0@1 U1@2 U2@3 U0@2 U1@3 U0@3"
        )


def test_a_circle_is_refused_with_the_least_lag() -> None:
    up = Route(Point(2, "B"), Point(0, "F"), "code")
    words = r"code B2 -> F0 .* F1 for F0.* it needs lag = 1 or more"
    with pytest.raises(DtrainError, match=words):
        prove((0, 1, 2), [3] * 4, [*local(3), up])
    with pytest.raises(DtrainError, match=r"code B2 -> F0 .*lag = 3 or more"):
        prove((0, 1, 2), [1] * 9, [*local(3), up])
    with pytest.raises(DtrainError, match=r"code B2 -> F0 \(lag 2\) .*lag = 3 or more"):
        prove((0, 0, 0), [1] * 9, [*local(3), up._replace(lag=2)])
    assert prove((0, 1, 2), [1] * 9, [*local(3), up._replace(lag=3)]).staleness == (0, 0, 0)
    with pytest.raises(DtrainError, match=r"lag = 1 or more"):
        prove((0, 1, 2), [1] * 9, [*local(3), up], "update")
    prove((0, 1, 2), [1] * 9, [*local(3), up._replace(lag=1)], "update")


def test_what_flows_back() -> None:
    assert [feeds_back(routing(3)) for routing in ROUTINGS] == [
        *(False, True, True, True, True, True, True),
    ]
    assert feeds_back([Route(Point(0, "B"), Point(1, "F"), "learnt")])
    assert not feeds_back([Route(Point(1, "F"), Point(1, "F", 1), "own")])


def test_passes_are_counted_from_the_routes() -> None:
    assert [count_forward_passes(routes) for routes in ([], local(3), twice(3))] == [1, 1, 2]


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (Route(Point(1, "B"), Point(0, "B"), "g", 1), "1.0<0.0 1.1<0.1 2.0<1.0"),
        (Route(Point(1, "B"), Point(0, "B"), "g", 2), "2.0<0.0 4.0<2.0"),
        (Route(Point(1, "B"), Point(0, "B"), "g", 9), ""),
        (Route(Point(0, "F"), Point(1, "B"), "s", 0, True), "0.0<0.0 1.0<1.0 2.0<2.0 4.0<4.0"),
        (Route(Point(1, "B"), Point(0, "B"), "g", 1, True), "1.0<0.0 2.0<1.0"),
        (Route(Point(1, "U"), Point(0, "F"), "w", 2), "2.0<0.-1 4.0<2.-1"),
        (Route(Point(0, "F"), Point(1, "U"), "f"), "0.-1<0.0 1.-1<1.0 2.-1<2.0 4.-1<4.0"),
        (Route(Point(0, "U"), Point(1, "U"), "w", 3), "3.-1<0.-1 4.-1<1.-1"),
    ],
)
def test_messages_exist_where_both_ends_do(route: Route, words: str) -> None:
    sizes, where, routes = [2, 2, 1, 0, 1], (0, 1), [*local(2), route]
    sent, came = [], []
    for stage in (0, 1):
        messages = MessageTable(routes, where, stage, sizes)
        for action in cyclic_order(stage, where, sizes, routes):
            if 1 in messages.incoming(action):
                update, micro = messages.source_micro_batch(1, action)
                came.append(f"{action.update}.{action.micro}<{update}.{micro}")
            if 1 in messages.outgoing(action):
                sent.append(f"{action.update}.{action.micro}")
    assert " ".join(came) == words
    assert sent == [word.partition("<")[2] for word in came]
    prove(where, sizes, routes)


def test_a_split_plan_serves_the_routes_of_learning_in_its_first_half() -> None:
    messages = MessageTable(backprop(2), (0, 0), 0, [1])
    assert (
        messages.outgoing(Action("I", 1, 0, 0)) == messages.incoming(Action("I", 0, 0, 0)) == (1,)
    )
    assert messages.outgoing(Action("W", 1, 0, 0)) == messages.incoming(Action("W", 0, 0, 0)) == ()


def test_a_lag_needs_a_larger_window() -> None:
    """As many receives are posted as are sent before the first is taken, else all would wait."""
    routes, sizes = lagged(2), [4, 4, 2]
    assert [MessageTable(routes, (0, 1), 0, sizes).window(r) for r in (0, 1)] == [1, 5]
    once = [route._replace(once=True) for route in routes]
    assert MessageTable(once, (0, 1), 0, sizes).window(1) == 2
    prove((0, 1), sizes, routes)


def test_a_window_of_one_deadlocks_under_a_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MessageTable, "window", lambda self, route: 1)
    with pytest.raises(PlanError, match=r"deadlock: stage 0 waits at .* for stage 1 to take"):
        prove((0, 1), [4, 4, 4], lagged(2))


def test_many_blocks_are_ordered_in_time() -> None:
    plan = list(cyclic_order(0, (0,) * 256, [1] * 4, backprop(256)))
    assert len(plan) == 4 * 3 * 256
