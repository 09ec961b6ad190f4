"""Simulated time, idle time, memory and traffic against closed forms."""

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

FORWARD_S, BACKWARD_S, HOP_S = 2.0, 5.0, 0.25


def forecast_update(
    stages: int, name: str, micros: int, costs: CostModel, credits: int = 2
) -> Forecast:
    """Return the forecast of one update with one block per stage."""
    routes = local(stages) if name == "stream" else backprop(stages)
    return forecast(SCHEDULES[name](), range(stages), [[micros]], routes, costs, credits)


def equal_costs(stages: int, hop_s: float = 0, cost: BlockCost | None = None) -> CostModel:
    """Return the same costs for all blocks and links."""
    cost = cost or BlockCost(FORWARD_S, 2, BACKWARD_S - 2)
    return CostModel((cost,) * stages, links=lambda source, target: Link(latency_s=hop_s))


@pytest.mark.parametrize("credits", [0, 2, 9])
@pytest.mark.parametrize(("stages", "micros"), [(1, 3), (4, 8), (8, 16)])
def test_streaming_fills_once(stages: int, micros: int, credits: int) -> None:
    """Makespan (P-1)(f+c) + M U: the fill is the only idle time."""
    result = forecast_update(stages, "stream", micros, equal_costs(stages, HOP_S), credits)
    steps = micros * (FORWARD_S + BACKWARD_S)
    assert result.makespan_s == pytest.approx((stages - 1) * (FORWARD_S + HOP_S) + steps)
    assert result.busy_s == pytest.approx((steps,) * stages)
    assert result.wait_s == pytest.approx((0,) * stages)
    assert result.bubble == pytest.approx(1 - steps / result.makespan_s)


@pytest.mark.parametrize("name", ["fill-drain", "1f1b"])
@pytest.mark.parametrize(("stages", "micros"), [(4, 8), (4, 16), (8, 16), (8, 32)])
@pytest.mark.parametrize("times", [(1, 1, 1), (1, 1.5, 0.5), (1, 1.2, 0.8)])
def test_flush_schedules_depend_on_the_whole_backward(
    name: str, stages: int, micros: int, times: tuple[float, float, float]
) -> None:
    result = forecast_update(stages, name, micros, equal_costs(stages, cost=BlockCost(*times)))
    assert result.makespan_s - micros * sum(times) == pytest.approx((stages - 1) * sum(times))
    assert result.bubble == pytest.approx((stages - 1) / (micros + stages - 1))


def test_the_slowest_stage_sets_the_rate() -> None:
    costs = [BlockCost(1, 1, 1), BlockCost(2, 2, 2), BlockCost(1, 1, 1)]
    result = forecast_update(3, "stream", 50, CostModel(costs))
    assert result.makespan_s == pytest.approx(1 + 2 + 49 * 6 + 4 + 2 - 2)
    assert result.busy_s == (150, 300, 150)
    assert result.wait_s[2] == pytest.approx(49 * 3)
    assert result.wait_s[1] == 0


def test_credits_bound_how_far_a_fast_stage_runs_ahead() -> None:
    costs = [BlockCost(1, 0, 0), BlockCost(9, 0, 0)]
    waits = [
        forecast_update(2, "stream", 20, CostModel(costs), credits).wait_s[0]
        for credits in (0, 2, 30)
    ]
    assert waits[0] > waits[1] > waits[2] == 0
    # The send of message k returns when k - 1 - credits is received, at 1 + 9 (k - 1 - credits);
    # the last is k = 19, and 20 units of work are done.
    assert waits[1] == 1 + 9 * (19 - 1 - 2) - 20


def test_messages_queue_on_their_link() -> None:
    link = Link("wan", latency_s=1, bytes_per_s=10)
    costs = CostModel(
        (BlockCost(1, 0, 0),) * 2, message_bytes=[50], links=lambda source, target: link
    )
    result = forecast_update(2, "stream", 4, costs, credits=9)
    assert result.makespan_s == 1 + 4 * 5 + 1 + 1
    assert (result.messages, result.message_bytes) == ({"wan": 4}, {"wan": 200})


def test_traffic_is_summed_by_the_kind_of_link() -> None:
    def links(source: int, target: int) -> Link:
        return Link("intra-node" if source // 2 == target // 2 else "inter-node")

    costs = CostModel((BlockCost(1, 1, 1),) * 5, message_bytes=[1, 10, 100, 1000] * 2, links=links)
    place = (0, 0, 1, 2, 3)
    result = forecast(SCHEDULES["1f1b"](), place, [[3, 3], [3, 2]], backprop(5), costs)
    assert result.messages == {"intra-node": 24, "inter-node": 12}
    assert result.message_bytes == {"intra-node": 12 * 1010, "inter-node": 12 * 100}


@pytest.mark.parametrize(
    ("name", "live"),
    [("fill-drain", [7] * 4), ("1f1b", [4, 3, 2, 1]), ("stream", [1] * 4)],
)
def test_memory_is_fixed_live_and_message_bytes(name: str, live: Sequence[int]) -> None:
    cost = BlockCost(1, 1, 1, live_bytes=1000, fixed_bytes=10**6)
    result = forecast_update(4, name, 7, CostModel((cost,) * 4))
    assert result.live_bytes == tuple(1000 * count for count in live)
    assert result.peak_message_bytes == (0,) * 4
    assert result.peak_bytes == tuple(10**6 + 1000 * count for count in live)


def test_messages_take_memory_until_they_arrive() -> None:
    """The next receive is always posted; a sent message is kept until it arrives.

    A local message is received at once and counts as part of the live micro-batch.
    """
    link = Link(latency_s=5)
    costs = CostModel(
        (BlockCost(1, 1, 1),) * 2, message_bytes=[100], links=lambda source, target: link
    )
    assert forecast_update(2, "stream", 6, costs).peak_message_bytes == (200, 100)
    routes = local(2)
    result = forecast(SCHEDULES["stream"](), (0, 0), [[6]], routes, costs)
    assert (result.peak_message_bytes, result.messages) == ((0,), {})


def test_replicas_wait_for_the_slowest_and_for_the_sync() -> None:
    costs = CostModel([BlockCost(1, 1, 1, update_s=0.5, sync_s=4)])
    result = forecast(SCHEDULES["stream"](), (0,), [[1, 1], [3, 3], [3, 3]], [], costs)
    assert result.makespan_s == 2 * (9 + 4 + 0.5)
    assert result.busy_s == (19,)
    assert result.wait_s == (2 * 4 + 6 + 6 - 0,)


def test_an_empty_segment_takes_no_time() -> None:
    result = forecast_update(2, "1f1b", 0, equal_costs(2))
    assert (result.makespan_s, result.bubble, result.busy_s) == (0, 0, (0, 0))


def test_wide_pipelines_are_simulated_in_time() -> None:
    costs = CostModel((BlockCost(0.02, 0.02, 0.02, 0.001),) * 64, message_bytes=[1 << 20] * 126)
    start = time.process_time()
    result = forecast(
        SCHEDULES["1f1b"](), assign_stages([1] * 64, 64), [[8] * 25], backprop(64), costs
    )
    assert time.process_time() - start < 2
    assert sum(result.messages.values()) == 2 * 63 * 200


def test_routes_between_two_ranks_share_their_link() -> None:
    routes: list[Route] = [*local(2), local(2)[0]._replace(name="twin")]
    link = Link(bytes_per_s=1)
    costs = CostModel((BlockCost(0, 0, 0),) * 2, [3, 4], links=lambda source, target: link)
    result = forecast(SCHEDULES["stream"](), (0, 1), [[1]], routes, costs)
    assert result.makespan_s == 7
