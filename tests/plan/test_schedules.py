"""Every schedule on many shapes: complete, free of deadlock, as live and as idle as the theory."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from dtrain.errors import DtrainError
from dtrain.partition import assign_stages
from dtrain.schedules import SCHEDULES
from dtrain.schedules.actions import Action, Point, Route
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.schedules.base import evaluation_plan
from dtrain.schedules.messages import MessageTable
from dtrain.schedules.simulator import Simulator
from dtrain.schedules.verify import verify_schedule


def local(blocks: int) -> list[Route]:
    """Return the routes of local learning: activations flow forward."""
    return [Route(Point(b, "F"), Point(b + 1, "F"), "activation") for b in range(blocks - 1)]


def backprop(blocks: int) -> list[Route]:
    """Return the routes of backpropagation."""
    back = (Route(Point(b + 1, "B"), Point(b, "B"), "gradient") for b in range(blocks - 1))
    return local(blocks) + list(back)


def votes(blocks: int) -> list[Route]:
    """Return the routes of an evaluation that hands votes straight to the last block."""
    last = Point(blocks - 1, "F")
    return local(blocks) + [Route(Point(b, "F"), last, "votes") for b in range(blocks - 1)]


Routing = Callable[[int], list[Route]]
CELLS: list[tuple[str, Routing]] = [
    (name, routes)
    for name in SCHEDULES
    for routes in (local, backprop, votes)
    # What is late counts blocks, not ranks: test_late.py holds its numbers.
    if not SCHEDULES[name].asynchronous
    and not (name in ("stream", "drained") and routes is backprop)
]
SIZES = [
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
LAYOUTS = [(1, 1), (3, 1), (2, 2), (5, 2), (3, 3), (7, 3), (8, 8)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("name", "routes"), CELLS)
def test_plans_are_proved(name: str, routes: Routing, sizes: list[list[int]]) -> None:
    most = max(max(row) for row in sizes)
    for blocks, stages in LAYOUTS:
        report = verify_schedule(
            SCHEDULES[name](), assign_stages([1] * blocks, stages), sizes, routes(blocks)
        )
        assert report.staleness == (0,) * stages
        once = [1] * stages
        ahead = {"stream": once, "drained": once, "fill-drain": [most] * stages}.get(
            name, [stages - stage for stage in range(stages)]
        )
        assert report.peak_live == tuple(min(most, live) for live in ahead), (blocks, stages)


@pytest.mark.parametrize(("name", "routes"), CELLS)
def test_every_action_happens_once(name: str, routes: Routing) -> None:
    sizes, where = (2, 0, 3), (0, 0, 1, 2, 2)
    seen: list[Action] = []
    for stage in range(3):
        plan = list(SCHEDULES[name]().plan(stage, where, sizes, routes(5)))
        assert all(where[action.block] == stage for action in plan)
        seen += plan
    micros = [(u, m) for u, size in enumerate(sizes) for m in range(size)]
    expected = [Action(kind, b, *micro) for kind in "FB" for b in range(5) for micro in micros]
    expected += [Action("U", b, u) for b in range(5) for u in range(3)]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize(("name", "routes"), CELLS)
def test_micro_batches_are_learnt_in_order(name: str, routes: Routing) -> None:
    where = (0, 0, 1, 2, 2)
    for stage in range(3):
        for block in range(5):
            plan = SCHEDULES[name]().plan(stage, where, (5, 4), routes(5))
            learnt = [a[2:] for a in plan if a.kind == "B" and a.block == block]
            assert learnt == sorted(learnt)


def text(name: str, stage: int, where: tuple[int, ...], micros: int, routes: list[Route]) -> str:
    return " ".join(map(str, SCHEDULES[name]().plan(stage, where, (micros,), routes)))


def test_orders_in_words() -> None:
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
    """A rank with the first and the last block learns the last one two hops later."""
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


@pytest.mark.parametrize("name", SCHEDULES)
def test_large_meshes_are_checked_in_time(name: str) -> None:
    """64 stages, or half of them in a quarter of the time."""
    stages = 48 if name == "1f1b" else 32
    routes = local(stages) if name == "stream" else backprop(stages)
    micros = 1 if issubclass(SCHEDULES[name], AsyncSchedule) else stages
    sizes = [[micros] * 390 + [micros - (replica > 20)] for replica in range(64)]
    start = time.process_time()
    verify_schedule(SCHEDULES[name](), range(stages), sizes, routes)
    assert time.process_time() - start < 2 * (stages / 64) ** 2


def test_routes_that_do_not_fit_are_refused_whatever_the_place() -> None:
    with pytest.raises(DtrainError, match=r"gradient B1 -> B0 .*1f1b.*fill-drain"):
        verify_schedule(SCHEDULES["stream"](), (0, 0), [[2]], backprop(2))
    with pytest.raises(DtrainError, match="gradient"):
        next(SCHEDULES["stream"]().plan(0, (0, 0), (2,), backprop(2)))
    upward = [Route(Point(0, "B"), Point(1, "F"), "updated")]
    for name in ("stream", "fill-drain", "1f1b"):
        with pytest.raises(DtrainError, match="updated B0 -> F1"):
            SCHEDULES[name]().check_routes(upward)


@pytest.mark.parametrize("kinds", ["BB", "UU", "BF", "UF"])
@pytest.mark.parametrize(("blocks", "distance"), [(2, 1), (5, 1), (5, 4), (5, 3)])
@pytest.mark.parametrize("sizes", [[1] * 12, [3] * 6, [3, 3, 2, 1, 3, 3]], ids=str)
def test_streaming_serves_what_comes_back_late_enough(
    kinds: str, blocks: int, distance: int, sizes: list[int]
) -> None:
    """One update late for each block that is passed, and one: then nobody waits."""
    stream, earlier = SCHEDULES["stream"](), range(blocks - distance)
    source, target = kinds
    for lag in (distance, distance + 1):
        back = [Route(Point(b + distance, source), Point(b, target), "late", lag) for b in earlier]
        routes, where = [*local(blocks), *back], tuple(range(blocks))
        if lag == distance:
            with pytest.raises(DtrainError, match="as many updates late as"):
                stream.check_routes(routes)
            continue
        report = verify_schedule(stream, where, [sizes], routes)
        assert report.staleness == (0,) * blocks
        assert report.peak_live == (1,) * blocks
        # The whole takes no longer than without: as many cycles, and one for each hop.
        ends = [span.end for span in report.timeline if span.stage == blocks - 1]
        assert max(ends) <= 3 * (len(sizes) * max(sizes) + blocks - 1)


@pytest.mark.parametrize("where", [(0,), (0, 0, 0), (0, 1, 2), (0, 0, 1, 1, 2), (0, 1, 0)])
def test_evaluations_flow(where: tuple[int, ...]) -> None:
    routes = votes(len(where))
    plans = [tuple(evaluation_plan(stage, where, 5)) for stage in range(max(where) + 1)]
    course = Simulator({0: plans}, {0: [5]}, where, routes)
    course.run()
    assert sum(map(len, course.spans.values())) == 5 * len(where)


def test_messages_follow_from_the_own_plan() -> None:
    where, routes = (0, 0, 1), backprop(3)
    messages = MessageTable(routes, where, 0, (3,))
    names = [routes[r].name for r in messages.incoming(Action("B", 1, 0, 0))]
    assert names == ["gradient"]
    assert messages.incoming(Action("F", 0, 0, 0)) == ()
    assert messages.incoming(Action("F", 2, 0, 0)) == ()  # another stage's
    assert messages.incoming(Action("U", 1, 0)) == ()
    assert messages.outgoing(Action("F", 1, 0, 0)) == (1,)
    assert [messages.is_local(r) for r in range(4)] == [True, False, True, False]
    assert (messages.source_stage(3), messages.target_stage(3)) == (1, 0)
    plan = SCHEDULES["1f1b"]().plan(0, where, (3,), routes)
    assert [(r, str(a)) for r, a in messages.remote_receives(plan)] == [
        (3, "B1.0"),
        (3, "B1.1"),
        (3, "B1.2"),
    ]


@pytest.mark.parametrize(("name", "routes"), CELLS)
def test_what_is_sent_is_what_is_received(name: str, routes: Routing) -> None:
    where, rows = (0, 0, 1, 2, 2), routes(5)
    sent: dict[int, list[tuple[int, int]]] = {}
    came: dict[int, list[tuple[int, int]]] = {}
    for stage in range(3):
        messages = MessageTable(rows, where, stage, (3, 2))
        plan = list(SCHEDULES[name]().plan(stage, where, (3, 2), rows))
        for action in plan:
            for route in messages.outgoing(action):
                if not messages.is_local(route):
                    sent.setdefault(route, []).append((action.update, action.micro))
        for route, action in messages.remote_receives(plan):
            came.setdefault(route, []).append((action.update, action.micro))
    assert sent == came


def proved(*sizes: int) -> list[int]:
    """Return the sizes of the updates that are proved of one replica on 8 stages."""
    report = verify_schedule(SCHEDULES["stream"](), range(8), [list(sizes)], local(8))
    first = [span.action for span in report.timeline if span.stage == 0]
    updates = [action.update for action in first if action.kind == "U"]
    return [sum(a.kind == "F" and a.update == update for a in first) for update in updates]


def test_the_proof_covers_a_full_pipeline_and_every_kind_of_update() -> None:
    assert proved(*[1] * 100) == [1] * 16
    assert proved(*[6] * 100) == [6] * 3
    assert proved(*[6] * 50, 5, *[6] * 50, 2) == [6, 6, 6, 5, 2]
    assert proved(6, 2) == [6, 2]


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
