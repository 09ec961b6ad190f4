"""Schedules that never drain: delays, live micro-batches and versions of the reference's table."""

from __future__ import annotations

import pytest

from dtrain.errors import DtrainError
from dtrain.partition import assign_stages
from dtrain.schedules.actions import Action
from dtrain.schedules.base import Schedule
from dtrain.schedules.cost_model import unit_costs
from dtrain.schedules.forecast import forecast
from dtrain.schedules.pipedream import PipeDream, PipeDream2BW
from dtrain.schedules.pipelined import Pipelined
from dtrain.schedules.verify import PlanError, verify_plans, verify_schedule
from dtrain.schedules.weight_policy import peak_weight_copies
from tests.plan.test_schedules import backprop

BLOCKS = (*range(1, 9), 12, 16)


def ones(blocks: int) -> list[int]:
    """Return a segment that is long enough to fill the pipeline and to go on."""
    return [1] * (4 * blocks + 4)


def versions(schedule: Schedule, blocks: int, sizes: list[int]) -> list[int]:
    """Return by block how many versions of its weights a run holds, the present one included."""
    where, routes = range(blocks), backprop(blocks)
    policy = schedule.policy(where, routes)
    plans = (list(schedule.plan(stage, where, sizes, routes)) for stage in where)
    return [1 + peak_weight_copies(plan, policy)[block] for block, plan in enumerate(plans)]


def shares(blocks: int) -> list[int]:
    """Return numbers of ranks for so many blocks: one, all, and some between."""
    return sorted({1, 3, blocks // 2, blocks} & set(range(1, blocks + 1)))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_pipelined(blocks: int) -> None:
    """Delay 2(K-1-b), one more live, one version; stashed as many versions as are live."""
    own = [2 * (blocks - 1 - b) for b in range(blocks)]
    for stages in shares(blocks):
        where = assign_stages([1] * blocks, stages)
        report = verify_schedule(Pipelined(), where, [ones(blocks)], backprop(blocks))
        assert report.staleness == tuple(own[where.index(s)] for s in range(stages))
        assert report.peak_live == tuple(1 + own[where.index(s)] for s in range(stages))
        policy = Pipelined().policy(where, backprop(blocks))
        assert [each.updates for each in policy.delays] == own
        assert [each.first_block_gap for each in policy.delays] == list(range(blocks))
    assert versions(Pipelined(), blocks, ones(blocks)) == [1] * blocks
    assert versions(Pipelined(weights="stash"), blocks, ones(blocks)) == [1 + each for each in own]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_pipedream(blocks: int) -> None:
    """Delay K-1-b, K-b live, as many versions; with vertical sync K-1 and K everywhere."""
    own = [blocks - 1 - b for b in range(blocks)]
    for stages in shares(blocks):
        where = assign_stages([1] * blocks, stages)
        report = verify_schedule(PipeDream(), where, [ones(blocks)], backprop(blocks))
        assert report.staleness == tuple(own[where.index(s)] for s in range(stages))
        if stages == blocks:
            assert report.peak_live == tuple(1 + each for each in own)
        policy = PipeDream().policy(where, backprop(blocks))
        assert [each.updates for each in policy.delays] == own
        # SpecTrain: backward floor(k/2), forward floor(k/2) + N - k - 1.
        spectrain = PipeDream(weights="current", prediction="spectrain")
        ahead = spectrain.policy(where, backprop(blocks)).prediction_steps
        assert [ahead(k, 99, "B") for k in range(blocks)] == [k // 2 for k in range(blocks)]
        assert [ahead(k, 99, "F") for k in range(blocks)] == [
            k // 2 + blocks - k - 1 for k in range(blocks)
        ]
    assert versions(PipeDream(), blocks, ones(blocks)) == [1 + each for each in own]
    assert versions(PipeDream(vertical_sync=True), blocks, ones(blocks)) == [blocks] * blocks
    assert versions(PipeDream(weights="current"), blocks, ones(blocks)) == [1] * blocks


@pytest.mark.parametrize("blocks", BLOCKS)
def test_two_buffers(blocks: int) -> None:
    """One update late in every block, K-b live, two versions and never more."""
    for micros in {max(1, blocks - 1), blocks, blocks + 3}:
        sizes = [micros] * 4
        for stages in shares(blocks) if micros == blocks else {1, blocks}:
            where = assign_stages([1] * blocks, stages)
            verify_schedule(PipeDream2BW(), where, [sizes], backprop(blocks))
        report = verify_schedule(PipeDream2BW(), range(blocks), [sizes], backprop(blocks))
        assert report.peak_live == tuple(min(4 * micros, blocks - b) for b in range(blocks))
        assert versions(PipeDream2BW(), blocks, sizes) == [2] * blocks


@pytest.mark.parametrize("blocks", [2, 5, 16])
@pytest.mark.parametrize("schedule", [Pipelined(), PipeDream()])
def test_nobody_is_idle_once_the_pipeline_is_full(schedule: Schedule, blocks: int) -> None:
    """The makespan is that of the work, and of one fill and drain per segment."""
    few, many = (
        forecast(
            schedule, range(blocks), [[1] * n], backprop(blocks), unit_costs(blocks)
        ).makespan_s
        for n in (8 * blocks, 12 * blocks)
    )
    assert many - few == 3 * 4 * blocks


def test_unequal_replicas_fit() -> None:
    for schedule in (Pipelined(), PipeDream()):
        verify_schedule(schedule, (0, 1, 1, 2), [[1] * 9, [1] * 8 + [0]], backprop(4))
    verify_schedule(PipeDream2BW(), (0, 1, 1, 2), [[3, 3, 3, 2], [3, 3, 3, 0]], backprop(4))


def test_what_they_do_not_run_is_refused() -> None:
    with pytest.raises(
        DtrainError, match=r"'pipedream' updates after every micro-batch.*set micro"
    ):
        verify_schedule(PipeDream(), (0, 1), [[4]], backprop(2))
    with pytest.raises(DtrainError, match=r"5 blocks needs 4 micro-batches or more.*found 3"):
        verify_schedule(PipeDream2BW(), range(5), [[3, 3]], backprop(5))


def test_an_order_that_leaves_out_the_first_forward_is_rejected_with_its_place() -> None:
    """As the order that torch 2.13 gives the last stage of 1F1B: F1 ... FM for F0 ... FM-1."""
    first = [Action("F", 0, 0, m) for m in range(3)]
    first += [Action("B", 0, 0, m) for m in range(3)] + [Action("U", 0, 0)]
    last = [Action(kind, 1, 0, m + (kind == "F")) for m in range(3) for kind in "FB"]
    with pytest.raises(PlanError, match=r"stage 1 at F1.1 of update 0 \(position 0\): F1.0 of upd"):
        verify_plans([[first, [*last, Action("U", 1, 0)]]], (0, 1), backprop(2))
