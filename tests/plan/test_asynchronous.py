"""Asynchronous schedules: delays, live micro-batches and weight versions of the papers."""

from __future__ import annotations

import pytest

from dtrain.errors import ConfigError
from dtrain.partition import assign_stages
from dtrain.schedules.actions import Action
from dtrain.schedules.base import Schedule
from dtrain.schedules.cost_model import unit_costs
from dtrain.schedules.features_replay import FeaturesReplay
from dtrain.schedules.forecast import forecast
from dtrain.schedules.pipedream import PipeDream, PipeDream2BW
from dtrain.schedules.pipelined import Pipelined
from dtrain.schedules.verify import PlanError, verify_plans, verify_schedule
from dtrain.schedules.weight_policy import peak_weight_copies
from tests.plan.test_schedules import backprop, local
from tests.refusals import refuses

BLOCKS = (*range(1, 9), 12, 16)


def ones(blocks: int) -> list[int]:
    """Return a segment of one micro-batch per update that fills the pipeline and goes on."""
    return [1] * (4 * blocks + 4)


def versions(schedule: Schedule, blocks: int, micro_batches: list[int]) -> list[int]:
    """Return the peak number of weight versions of each block, the current one included."""
    place, routes = range(blocks), backprop(blocks)
    policy = schedule.policy(place, routes)
    plans = (list(schedule.plan(stage, place, micro_batches, routes)) for stage in place)
    return [1 + peak_weight_copies(plan, policy)[block] for block, plan in enumerate(plans)]


def stage_counts(blocks: int) -> list[int]:
    """Return numbers of stages for so many blocks: one, all, and some between."""
    return sorted({1, 3, blocks // 2, blocks} & set(range(1, blocks + 1)))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_pipelined(blocks: int) -> None:
    """Delay 2(K-1-b), one more live, one version; with a stash as many versions as are live."""
    delays = [2 * (blocks - 1 - b) for b in range(blocks)]
    for stages in stage_counts(blocks):
        place = assign_stages([1] * blocks, stages)
        report = verify_schedule(Pipelined(), place, [ones(blocks)], backprop(blocks))
        assert report.staleness == tuple(delays[place.index(s)] for s in range(stages))
        assert report.peak_live == tuple(1 + delays[place.index(s)] for s in range(stages))
        policy = Pipelined().policy(place, backprop(blocks))
        assert [delay.updates for delay in policy.delays] == delays
        assert [delay.first_block_gap for delay in policy.delays] == list(range(blocks))
    assert versions(Pipelined(), blocks, ones(blocks)) == [1] * blocks
    stashed = versions(Pipelined(weights="stash"), blocks, ones(blocks))
    assert stashed == [1 + delay for delay in delays]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_pipedream(blocks: int) -> None:
    """Delay K-1-b, K-b live, as many versions; with vertical sync K-1 and K everywhere."""
    delays = [blocks - 1 - b for b in range(blocks)]
    for stages in stage_counts(blocks):
        place = assign_stages([1] * blocks, stages)
        report = verify_schedule(PipeDream(), place, [ones(blocks)], backprop(blocks))
        assert report.staleness == tuple(delays[place.index(s)] for s in range(stages))
        if stages == blocks:
            assert report.peak_live == tuple(1 + delay for delay in delays)
        policy = PipeDream().policy(place, backprop(blocks))
        assert [delay.updates for delay in policy.delays] == delays
        # SpecTrain: backward floor(k/2), forward floor(k/2) + N - k - 1.
        spectrain = PipeDream(weights="current", prediction="spectrain")
        steps = spectrain.policy(place, backprop(blocks)).prediction_steps
        assert [steps(k, 99, "B") for k in range(blocks)] == [k // 2 for k in range(blocks)]
        assert [steps(k, 99, "F") for k in range(blocks)] == [
            k // 2 + blocks - k - 1 for k in range(blocks)
        ]
    assert versions(PipeDream(), blocks, ones(blocks)) == [1 + delay for delay in delays]
    assert versions(PipeDream(vertical_sync=True), blocks, ones(blocks)) == [blocks] * blocks
    assert versions(PipeDream(weights="current"), blocks, ones(blocks)) == [1] * blocks
    replay = verify_schedule(FeaturesReplay(), range(blocks), [ones(blocks)], backprop(blocks))
    assert (replay.staleness, replay.peak_live) == (tuple(delays), tuple(d + 1 for d in delays))
    assert versions(FeaturesReplay(), blocks, ones(blocks)) == [1] * blocks


@pytest.mark.parametrize("blocks", BLOCKS)
def test_pipedream_2bw(blocks: int) -> None:
    """One update late in every block, K-b live, never more than two versions."""
    for micros in {max(1, blocks - 1), blocks, blocks + 3}:
        micro_batches = [micros] * 4
        for stages in stage_counts(blocks) if micros == blocks else {1, blocks}:
            place = assign_stages([1] * blocks, stages)
            verify_schedule(PipeDream2BW(), place, [micro_batches], backprop(blocks))
        report = verify_schedule(PipeDream2BW(), range(blocks), [micro_batches], backprop(blocks))
        assert report.peak_live == tuple(min(4 * micros, blocks - b) for b in range(blocks))
        assert versions(PipeDream2BW(), blocks, micro_batches) == [2] * blocks


@pytest.mark.parametrize("blocks", [2, 5, 16])
@pytest.mark.parametrize("schedule", [Pipelined(), PipeDream()])
def test_no_rank_is_idle_once_the_pipeline_is_full(schedule: Schedule, blocks: int) -> None:
    """Further micro-batches add the time of their work alone."""
    routes, costs = backprop(blocks), unit_costs(blocks)
    short, long = (
        forecast(schedule, range(blocks), [[1] * updates], routes, costs).makespan_s
        for updates in (8 * blocks, 12 * blocks)
    )
    assert long - short == 3 * 4 * blocks


def test_unequal_replicas_fit() -> None:
    for schedule in (Pipelined(), PipeDream()):
        verify_schedule(schedule, (0, 1, 1, 2), [[1] * 9, [1] * 8 + [0]], backprop(4))
    verify_schedule(PipeDream2BW(), (0, 1, 1, 2), [[3, 3, 3, 2], [3, 3, 3, 0]], backprop(4))


def test_unsupported_micro_batches_are_refused() -> None:
    with refuses(ConfigError, "schedule.micro-batches-not-one"):
        verify_schedule(PipeDream(), (0, 1), [[4]], backprop(2))
    with refuses(ConfigError, "schedule.too-few-micro-batches"):
        verify_schedule(PipeDream2BW(), range(5), [[3, 3]], backprop(5))


@pytest.mark.parametrize("schedule", [PipeDream(), PipeDream2BW()])
def test_pipedream_needs_routes_that_flow_back(schedule: Schedule) -> None:
    with refuses(ConfigError, "schedule.no-backward-routes"):
        schedule.check_routes(local(3))
    assert not schedule.supports_all(local(3))


def test_an_order_without_the_first_forward_is_rejected() -> None:
    """The order that torch 2.13 gives the last stage of 1F1B: F1 ... FM for F0 ... FM-1."""
    first = [Action("F", 0, 0, m) for m in range(3)]
    first += [Action("B", 0, 0, m) for m in range(3)] + [Action("U", 0, 0)]
    last = [Action(kind, 1, 0, m + (kind == "F")) for m in range(3) for kind in ("F", "B")]
    with pytest.raises(PlanError) as caught:
        verify_plans([[first, [*last, Action("U", 1, 0)]]], (0, 1), backprop(2))
    assert caught.value.key == "plan.wrong-order"
    assert all(name in str(caught.value) for name in ("stage 1", "F1.1", "position 0", "F1.0"))
