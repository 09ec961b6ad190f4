"""Every schedule on many shapes: complete, free of deadlock, as live and as idle as published."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dtrain.errors import ConfigError
from dtrain.schedules import SCHEDULES
from dtrain.schedules.actions import Action, Point, Route
from dtrain.schedules.base import evaluation_plan
from dtrain.schedules.messages import MessageTable
from dtrain.schedules.simulator import Simulator
from dtrain.schedules.verify import verify_schedule
from tests.harness import some
from tests.refusals import refuses


def local(blocks: int) -> list[Route]:
    """Return the routes of local learning: activations flow forward."""
    return [Route(Point(b, "F"), Point(b + 1, "F"), "activation") for b in range(blocks - 1)]


def backprop(blocks: int) -> list[Route]:
    """Return the routes of backpropagation."""
    backward = (Route(Point(b + 1, "B"), Point(b, "B"), "gradient") for b in range(blocks - 1))
    return local(blocks) + list(backward)


def votes(blocks: int) -> list[Route]:
    """Return the routes of an evaluation in which all blocks send votes to the last block."""
    last = Point(blocks - 1, "F")
    return local(blocks) + [Route(Point(b, "F"), last, "votes") for b in range(blocks - 1)]


Routing = Callable[[int], list[Route]]
CELLS: list[tuple[str, Routing]] = [
    (name, routes)
    for name in SCHEDULES
    for routes in (local, backprop, votes)
    # Delays count blocks, not ranks: test_asynchronous.py holds the numbers.
    if not SCHEDULES[name].asynchronous
    and not (name in ("stream", "stream-replay", "drained", "fold") and routes is backprop)
    and not (name in ("stream-replay", "interleaved", "fold") and routes is votes)
]
MICRO_BATCHES = [
    [[1]],
    [[2, 2, 1]],
    [[7, 7]],
    [[3, 3, 0]],
    [[3, 3, 2], [3, 3, 1]],
    [[2, 1, 2, 0], [2, 0, 2, 0], [1, 0, 2, 1]],
    [[0, 1], [0, 0]],
    [[0, 0, 3, 0, 0, 1], [1, 1, 1, 1, 1, 1]],
    [[1] * 20, [1] * 20],
]
"""By [replica][update]."""
LAYOUTS = [(1, 1), (3, 1), (2, 2), (5, 2), (3, 3), (7, 3), (8, 8)]
"""Numbers of blocks and of stages."""


def own_place(name: str, blocks: int, stages: int) -> tuple[int, ...]:
    """Return the stages on which a schedule puts blocks of equal cost."""
    return SCHEDULES[name]().assign_stages([1] * blocks, stages)


@pytest.mark.parametrize("number", range(len(MICRO_BATCHES)))
@pytest.mark.parametrize(("name", "routes"), CELLS)
def test_plans_are_proved(name: str, routes: Routing, number: int) -> None:
    micro_batches = MICRO_BATCHES[number]
    largest = max(max(counts) for counts in micro_batches)
    for blocks, stages in some(LAYOUTS, CELLS.index((name, routes)) + number):
        place = own_place(name, blocks, stages)
        report = verify_schedule(SCHEDULES[name](), place, micro_batches, routes(blocks))
        assert report.staleness == (0,) * stages
        if name in ("interleaved", "fold") and blocks > stages:
            continue  # test_places.py holds their numbers
        one_live = [1] * stages
        forward = dict.fromkeys(("stream", "stream-replay", "drained", "fold"), one_live)
        live = {**forward, "fill-drain": [largest] * stages}.get(
            name, [stages - stage for stage in range(stages)]
        )
        assert report.peak_live == tuple(min(largest, count) for count in live), (blocks, stages)


@pytest.mark.parametrize(("name", "routes"), CELLS)
def test_every_action_happens_once(name: str, routes: Routing) -> None:
    micro_batches, place = (2, 0, 3), own_place(name, 5, 3)
    actions: list[Action] = []
    for stage in range(3):
        plan = list(SCHEDULES[name]().plan(stage, place, micro_batches, routes(5)))
        assert all(place[action.block] == stage for action in plan)
        actions += plan
    micros = [(u, m) for u, count in enumerate(micro_batches) for m in range(count)]
    expected = [Action(kind, b, *m) for kind in ("F", "B") for b in range(5) for m in micros]
    expected += [Action("U", b, u) for b in range(5) for u in range(3)]
    assert sorted(actions) == sorted(expected)


@pytest.mark.parametrize(("name", "routes"), CELLS)
def test_backwards_are_in_the_order_of_the_micro_batches(name: str, routes: Routing) -> None:
    place = own_place(name, 5, 3)
    for stage in range(3):
        for block in range(5):
            plan = SCHEDULES[name]().plan(stage, place, (5, 4), routes(5))
            keys = [action.key for action in plan if action.kind == "B" and action.block == block]
            assert keys == sorted(keys)


def text(name: str, stage: int, place: tuple[int, ...], micros: int, routes: list[Route]) -> str:
    """Return the plan of one update as text."""
    return " ".join(map(str, SCHEDULES[name]().plan(stage, place, (micros,), routes)))


def test_orders_as_text() -> None:
    assert text("stream", 1, (0, 1, 1), 2, local(3)) == (
        "F1.0 F2.0 B1.0 B2.0 F1.1 F2.1 B1.1 B2.1 U1 U2"
    )
    assert text("fill-drain", 1, (0, 1, 1), 2, backprop(3)) == (
        "F1.0 F2.0 F1.1 F2.1 B2.0 B1.0 B2.1 B1.1 U1 U2"
    )
    assert (
        text("1f1b", 0, (0, 1, 2), 4, backprop(3)) == "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3 U0"
    )
    assert text("1f1b", 2, (0, 1, 2), 2, backprop(3)) == "F2.0 B2.0 F2.1 B2.1 U2"
    assert text("1f1b", 0, tuple(range(8)), 2, backprop(8)) == "F0.0 F0.1 B0.0 B0.1 U0"


def test_stream_delays_blocks_by_hops_only() -> None:
    """A rank with the first and the last block runs the last one two hops later."""
    plan = SCHEDULES["stream"]().plan(0, (0, 1, 0), (3,), local(3))
    assert " ".join(a.kind + str(a.block) for a in plan) == (
        "F0 B0 F0 B0 F0 F2 B0 B2 U0 F2 B2 F2 B2 U2"
    )
    verify_schedule(SCHEDULES["stream"](), (0, 1, 0), [[3, 3]], local(3))


def test_an_empty_update_is_still_updated_in_order() -> None:
    plan = SCHEDULES["stream"]().plan(0, (0, 0), (0, 1, 0), local(2))
    assert " ".join(f"{a}@{a.update}" for a in plan if a.kind == "U") == (
        "U0@0 U1@0 U0@1 U1@1 U0@2 U1@2"
    )


@pytest.mark.parametrize("name", ["fill-drain", "1f1b"])
@pytest.mark.parametrize(
    ("stages", "micros", "bubble"),
    [(4, 8, 0.273), (4, 16, 0.158), (8, 16, 0.304), (8, 32, 0.179)],
)
def test_bubbles_of_flush_schedules(name: str, stages: int, micros: int, bubble: float) -> None:
    report = verify_schedule(SCHEDULES[name](), range(stages), [[micros]], backprop(stages))
    assert report.bubble == pytest.approx((stages - 1) / (micros + stages - 1))
    assert round(report.bubble, 3) == bubble
    assert report.makespan == 3 * (micros + stages - 1)
    assert report.messages == 2 * micros * (stages - 1)


@pytest.mark.parametrize(
    ("stages", "micros", "bubble"),
    [(4, 8, 0.111), (4, 16, 0.059), (8, 16, 0.127), (8, 32, 0.068), (4, 1000, 0.001)],
)
def test_bubbles_of_streaming(stages: int, micros: int, bubble: float) -> None:
    report = verify_schedule(SCHEDULES["stream"](), range(stages), [[micros]], local(stages))
    assert round(report.bubble, 3) == bubble
    assert report.makespan == 3 * micros + stages - 1
    assert report.messages == micros * (stages - 1)


def test_streaming_fills_once_per_segment() -> None:
    report = verify_schedule(SCHEDULES["stream"](), range(4), [[8, 8, 8]], local(4))
    assert report.makespan == 3 * 24 + 3


def test_unsupported_routes_are_refused_on_any_placement() -> None:
    unsupported = "schedule.route-unsupported"
    with refuses(ConfigError, unsupported) as caught:
        verify_schedule(SCHEDULES["stream"](), (0, 0), [[2]], backprop(2))
    assert all(name in caught.value.message for name in ("gradient B1 -> B0", "1f1b", "fill-drain"))
    with refuses(ConfigError, unsupported):
        next(SCHEDULES["stream"]().plan(0, (0, 0), (2,), backprop(2)))
    upward = [Route(Point(0, "B"), Point(1, "F"), "updated")]
    for name in ("stream", "fill-drain", "1f1b"):
        with refuses(ConfigError, unsupported):
            SCHEDULES[name]().check_routes(upward)


@pytest.mark.parametrize("kinds", ["BB", "UU", "BF", "UF"])
@pytest.mark.parametrize(("blocks", "distance"), [(2, 1), (5, 1), (5, 4), (5, 3)])
@pytest.mark.parametrize("micro_batches", [[1] * 12, [3] * 6, [3, 3, 2, 1, 3, 3]], ids=str)
def test_streaming_supports_feedback_that_is_late_enough(
    kinds: str, blocks: int, distance: int, micro_batches: list[int]
) -> None:
    """With a lag of one update plus one for each block that is passed, no rank waits."""
    stream, targets = SCHEDULES["stream"](), range(blocks - distance)
    source, target = kinds
    for lag in (distance, distance + 1):
        feedback = [
            Route(Point(b + distance, source), Point(b, target), "late", lag) for b in targets
        ]
        routes, place = [*local(blocks), *feedback], tuple(range(blocks))
        if lag == distance:
            with refuses(ConfigError, "schedule.route-unsupported"):
                stream.check_routes(routes)
            continue
        report = verify_schedule(stream, place, [micro_batches], routes)
        assert report.staleness == (0,) * blocks
        assert report.peak_live == (1,) * blocks
        # As long as without feedback: as many cycles, and one for each hop.
        ends = [span.end for span in report.timeline if span.stage == blocks - 1]
        assert max(ends) <= 3 * (len(micro_batches) * max(micro_batches) + blocks - 1)


@pytest.mark.parametrize("place", [(0,), (0, 0, 0), (0, 1, 2), (0, 0, 1, 1, 2), (0, 1, 0)])
def test_evaluations_run_to_their_end(place: tuple[int, ...]) -> None:
    plans = [tuple(evaluation_plan(stage, place, 5)) for stage in range(max(place) + 1)]
    simulator = Simulator({0: plans}, {0: [5]}, place, votes(len(place)))
    simulator.run()
    assert sum(map(len, simulator.spans.values())) == 5 * len(place)


def test_messages_follow_from_the_plan_of_the_rank() -> None:
    place, routes = (0, 0, 1), backprop(3)
    messages = MessageTable(routes, place, 0, (3,))
    names = [routes[r].name for r in messages.incoming(Action("B", 1, 0, 0))]
    assert names == ["gradient"]
    assert messages.incoming(Action("F", 0, 0, 0)) == ()
    assert messages.incoming(Action("F", 2, 0, 0)) == ()  # another stage's
    assert messages.incoming(Action("U", 1, 0)) == ()
    assert messages.outgoing(Action("F", 1, 0, 0)) == (1,)
    assert [messages.is_local(r) for r in range(4)] == [True, False, True, False]
    assert (messages.source_stage(3), messages.target_stage(3)) == (1, 0)
    plan = SCHEDULES["1f1b"]().plan(0, place, (3,), routes)
    assert [(r, str(a)) for r, a in messages.remote_receives(plan)] == [
        (3, "B1.0"),
        (3, "B1.1"),
        (3, "B1.2"),
    ]


@pytest.mark.parametrize(("name", "routes"), CELLS)
def test_messages_are_received_in_the_order_of_sending(name: str, routes: Routing) -> None:
    place = own_place(name, 5, 3)
    sent: dict[int, list[tuple[int, int]]] = {}
    received: dict[int, list[tuple[int, int]]] = {}
    for stage in range(3):
        messages = MessageTable(routes(5), place, stage, (3, 2))
        plan = list(SCHEDULES[name]().plan(stage, place, (3, 2), routes(5)))
        for action in plan:
            for route in messages.outgoing(action):
                if not messages.is_local(route):
                    sent.setdefault(route, []).append((action.update, action.micro))
        for route, action in messages.remote_receives(plan):
            received.setdefault(route, []).append((action.update, action.micro))
    assert sent == received


def proved_prefix(*micro_batches: int) -> list[int]:
    """Return the micro-batches of the updates that are proved, for one replica of 8 stages."""
    report = verify_schedule(SCHEDULES["stream"](), range(8), [list(micro_batches)], local(8))
    plan = [span.action for span in report.timeline if span.stage == 0]
    updates = [action.update for action in plan if action.kind == "U"]
    return [sum(a.kind == "F" and a.update == update for a in plan) for update in updates]


def test_the_proof_covers_a_full_pipeline_and_every_kind_of_update() -> None:
    assert proved_prefix(*[1] * 100) == [1] * 16
    assert proved_prefix(*[6] * 100) == [6] * 3
    assert proved_prefix(*[6] * 50, 5, *[6] * 50, 2) == [6, 6, 6, 5, 2]
    assert proved_prefix(6, 2) == [6, 2]


def test_an_update_waits_for_the_slowest_replica() -> None:
    report = verify_schedule(SCHEDULES["stream"](), (0,), [[1, 1], [3, 3]], [])
    assert [(str(s.action), s.start, s.end) for s in report.timeline] == [
        ("F0.0", 0, 1),
        ("B0.0", 1, 3),
        ("U0", 9, 9),
        ("F0.0", 9, 10),
        ("B0.0", 10, 12),
        ("U0", 18, 18),
    ]
    assert report.bubble == pytest.approx(1 - 24 / 36)
