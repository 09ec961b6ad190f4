"""Simulated time, waiting, memory and traffic against closed forms."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from dtrain.partition import assign_stages
from dtrain.schedules import SCHEDULES
from dtrain.schedules.actions import Route
from dtrain.schedules.cost_model import BlockCost, CostModel, Link
from dtrain.schedules.forecast import Forecast, forecast
from tests.plan.test_schedules import backprop, local

FORWARD_S, LEARN_S, HOP_S = 2.0, 5.0, 0.25


def one(stages: int, name: str, micros: int, costs: CostModel, credits: int = 2) -> Forecast:
    """Return the forecast of one update of a pipeline of single blocks."""
    routes = local(stages) if name == "stream" else backprop(stages)
    return forecast(SCHEDULES[name](), range(stages), [[micros]], routes, costs, credits)


def even(stages: int, hop_s: float = 0, price: BlockCost | None = None) -> CostModel:
    """Return costs that are the same everywhere."""
    price = price or BlockCost(FORWARD_S, 2, LEARN_S - 2)
    return CostModel((price,) * stages, links=lambda source, target: Link(latency_s=hop_s))


@pytest.mark.parametrize("credits", [0, 2, 9])
@pytest.mark.parametrize(("stages", "micros"), [(1, 3), (4, 8), (8, 16)])
def test_streaming_fills_once(stages: int, micros: int, credits: int) -> None:
    """(P-1)(f+c) + M*U of `reference`: the fill is all that anybody waits for."""
    told = one(stages, "stream", micros, even(stages, HOP_S), credits)
    steps = micros * (FORWARD_S + LEARN_S)
    assert told.makespan_s == pytest.approx((stages - 1) * (FORWARD_S + HOP_S) + steps)
    assert told.busy_s == pytest.approx((steps,) * stages)
    assert told.wait_s == pytest.approx((0,) * stages)
    assert told.bubble == pytest.approx(1 - steps / told.makespan_s)


@pytest.mark.parametrize("name", ["fill-drain", "1f1b"])
@pytest.mark.parametrize(("stages", "micros"), [(4, 8), (4, 16), (8, 16), (8, 32)])
@pytest.mark.parametrize("shares", [(1, 1, 1), (1, 1.5, 0.5), (1, 1.2, 0.8)])
def test_flush_schedules_depend_on_the_whole_backward(
    name: str, stages: int, micros: int, shares: tuple[float, float, float]
) -> None:
    told = one(stages, name, micros, even(stages, price=BlockCost(*shares)))
    assert told.makespan_s - micros * sum(shares) == pytest.approx((stages - 1) * sum(shares))
    assert told.bubble == pytest.approx((stages - 1) / (micros + stages - 1))


def test_the_slowest_stage_sets_the_pace() -> None:
    prices = [BlockCost(1, 1, 1), BlockCost(2, 2, 2), BlockCost(1, 1, 1)]
    told = one(3, "stream", 50, CostModel(prices))
    assert told.makespan_s == pytest.approx(1 + 2 + 49 * 6 + 4 + 2 - 2)
    assert told.busy_s == (150, 300, 150)
    assert told.wait_s[2] == pytest.approx(49 * 3)
    assert told.wait_s[1] == 0


def test_credits_bound_how_far_a_fast_stage_runs_ahead() -> None:
    prices = [BlockCost(1, 0, 0), BlockCost(9, 0, 0)]
    waits = [one(2, "stream", 20, CostModel(prices), credits).wait_s[0] for credits in (0, 2, 30)]
    assert waits[0] > waits[1] > waits[2] == 0
    # The send of message k returns when k - 1 - credits was taken, at 1 + 9 (k - 1 - credits);
    # the last is k = 19, and 20 units of work are done.
    assert waits[1] == 1 + 9 * (19 - 1 - 2) - 20


def test_messages_queue_on_their_link() -> None:
    link = Link("wan", latency_s=1, bytes_per_s=10)
    costs = CostModel(
        (BlockCost(1, 0, 0),) * 2, message_bytes=[50], links=lambda source, target: link
    )
    told = one(2, "stream", 4, costs, credits=9)
    assert told.makespan_s == 1 + 4 * 5 + 1 + 1
    assert (told.messages, told.message_bytes) == ({"wan": 4}, {"wan": 200})


def test_traffic_is_summed_by_the_kind_of_link() -> None:
    def links(source: int, target: int) -> Link:
        return Link("intra-node" if source // 2 == target // 2 else "inter-node")

    costs = CostModel((BlockCost(1, 1, 1),) * 5, message_bytes=[1, 10, 100, 1000] * 2, links=links)
    where = (0, 0, 1, 2, 3)
    told = forecast(SCHEDULES["1f1b"](), where, [[3, 3], [3, 2]], backprop(5), costs)
    assert told.messages == {"intra-node": 24, "inter-node": 12}
    assert told.message_bytes == {"intra-node": 12 * 1010, "inter-node": 12 * 100}


@pytest.mark.parametrize(
    ("name", "live"),
    [("fill-drain", [7] * 4), ("1f1b", [4, 3, 2, 1]), ("stream", [1] * 4)],
)
def test_memory_is_what_is_fixed_live_and_held(name: str, live: Sequence[int]) -> None:
    price = BlockCost(1, 1, 1, live_bytes=1000, fixed_bytes=10**6)
    told = one(4, name, 7, CostModel((price,) * 4))
    assert told.live_bytes == tuple(1000 * each for each in live)
    assert told.peak_message_bytes == (0,) * 4
    assert told.peak_bytes == tuple(10**6 + 1000 * each for each in live)


def test_messages_are_held_until_they_arrive() -> None:
    """The next receive is always posted; what was sent stays until it is there.

    What is handed over on a rank is taken at once, and is part of what is live.
    """
    link = Link(latency_s=5)
    costs = CostModel(
        (BlockCost(1, 1, 1),) * 2, message_bytes=[100], links=lambda source, target: link
    )
    assert one(2, "stream", 6, costs).peak_message_bytes == (200, 100)
    routes = local(2)
    told = forecast(SCHEDULES["stream"](), (0, 0), [[6]], routes, costs)
    assert (told.peak_message_bytes, told.messages) == ((0,), {})


def test_replicas_wait_for_each_other_and_for_the_sync() -> None:
    costs = CostModel([BlockCost(1, 1, 1, update_s=0.5, sync_s=4)])
    told = forecast(SCHEDULES["stream"](), (0,), [[1, 1], [3, 3], [3, 3]], [], costs)
    assert told.makespan_s == 2 * (9 + 4 + 0.5)
    assert told.busy_s == (19,)
    assert told.wait_s == (2 * 4 + 6 + 6 - 0,)


def test_nothing_to_do_takes_no_time() -> None:
    told = one(2, "1f1b", 0, even(2))
    assert (told.makespan_s, told.bubble, told.busy_s) == (0, 0, (0, 0))


def test_wide_pipelines_are_simulated_in_time() -> None:
    costs = CostModel((BlockCost(0.02, 0.02, 0.02, 0.001),) * 64, message_bytes=[1 << 20] * 126)
    start = time.process_time()
    told = forecast(
        SCHEDULES["1f1b"](), assign_stages([1] * 64, 64), [[8] * 25], backprop(64), costs
    )
    assert time.process_time() - start < 2
    assert sum(told.messages.values()) == 2 * 63 * 200


def test_routes_between_two_ranks_share_their_link() -> None:
    routes: list[Route] = [*local(2), local(2)[0]._replace(name="twin")]
    link = Link(bytes_per_s=1)
    costs = CostModel((BlockCost(0, 0, 0),) * 2, [3, 4], links=lambda source, target: link)
    told = forecast(SCHEDULES["stream"](), (0, 1), [[1]], routes, costs)
    assert told.makespan_s == 7
