"""Combinations of objective, schedule and sync: laws 1 and 3 in every cell.

Invariant: a cell is one segment of one run with ranks as threads, without a run folder, since the
strategies decide nothing about files and evaluation. Every pair of strategies is in a cell of every
run of the tests; `make test-full` trains the whole product. A model that several laws compare is
trained once: blocks are counted once for each objective; of its synchronous schedules, which train
the same bits, one is trained on a single stage; each cell by itself is trained on three::

    stages x replicas    1 x 1          1 x 2          3 x 2
    one schedule           o ---------------------------.         replicas that agree are one
                                          o ----------. |         the same bits
    each schedule                                     o o   <- a cell: some twenty milliseconds
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dtrain.build import build_rank
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data.sampler import epoch_order
from dtrain.errors import DtrainError
from dtrain.mesh import RankMesh
from dtrain.objectives import OBJECTIVES
from dtrain.planning.plan import Plan, make_plan
from dtrain.schedules import SCHEDULES
from dtrain.syncs import SYNCS
from dtrain.syncs.base import SyncTraits
from dtrain.syncs.common.wrapper import Wrapper
from tests import harness, tiny

NET: dict[str, Any] = {
    "model__widths": [9, 7, 6],
    "partition": {"cuts": [1, 2]},  # named, since balancing costs every possible cut
    "batch_size": 23,  # 23, 23, 4 samples, of which two replicas have 12 and 11
    "epochs": 1,
    "optimizer__lr": 0.02,
}
FIELDS: dict[str, dict[str, Any]] = {
    **{name: {"every": 2} for name in ("local-sgd", "qsr", "diloco")},
    "daso": {"warmup-epochs": 0, "cooldown-epochs": 0, "max-global-skips": 1},
    "ab": {"warmup-updates": 1, "every": 9},
    "oialr": {"delay-updates": 1, "every": 1, "cutoff": 0.7, "share": 1.0},
    "warmup": {"updates": 1, "inner": {"name": "local-sgd", "every": 2}},
    "only-large": {"elements": 50, "inner": {"name": "int8"}},
}
"""Fields with which a sync acts within three updates. Each replica is on a node of its own."""


class Trained(NamedTuple):
    """The evaluated tensors at the end of a cell, and the losses of each replica by block."""

    weights: dict[str, Tensor]
    loss: list[dict[int, float]]


PAIRS = harness.pairs()
WRAPPERS = {name for name, kind in SYNCS.items() if issubclass(kind, Wrapper)}
"""They send nothing of their own: one objective of each pattern is enough."""
PRODUCT = [cell for cell in harness.cells() if cell[2] not in WRAPPERS or cell[0] in tiny.PATTERNS]
CELLS = harness.pairwise(PRODUCT)
SYNCHRONOUS = [cell for cell in PRODUCT if not SCHEDULES[cell[1]].asynchronous]
"""Law 3 holds where no gradient is taken at weights that have changed since."""
FIRST = {objective: schedule for objective, schedule, _ in reversed(SYNCHRONOUS)}
"""The synchronous schedule of an objective that stands for all of them on one stage."""


@cache
def traits_of(name: str) -> SyncTraits:
    """Return the traits of a sync with fields that make it act within three updates."""
    return tiny.run(sync={"name": name, **FIELDS.get(name, {})}).sync.instance.traits()


def cell_run(objective: str, schedule: str, stages: int, micros: int) -> RunConfig:
    """Return the run of a cell, whatever its sync."""
    named = {"objective__name": objective, "schedule__name": schedule}
    if SCHEDULES[schedule].delays_count_micro_batches:
        micros = 1
    return tiny.run(**NET, **named, micro_batches=micros, mesh__stages=stages)


@cache
def base_plan(objective: str, schedule: str) -> Plan:
    """Return a plan of an objective, whose blocks and costs are those of many of its cells."""
    return make_plan(cell_run(objective, schedule, 1, 1), 1)


@cache
def cell_plan(objective: str, schedule: str, stages: int, replicas: int, micros: int) -> Plan:
    """Return the plan of a cell, with the blocks of the objective's base plan."""
    run = cell_run(objective, schedule, stages, micros)
    kind, count = run.schedule.instance, run.settings.micro_batches
    base = base_plan(objective, schedule if kind.rebuilds_inputs else FIRST[objective])
    blocks = tuple(
        replace(block, recompute=block.recompute or kind.recomputes)
        for block in base.layout.block_layouts
    )
    place = kind.assign_stages([block.cost for block in blocks], stages)
    mesh = RankMesh.for_ranks(stages * replicas, stages, run.mesh.placement)
    layout = replace(base.layout, mesh=mesh, schedule=kind, place=place, block_layouts=blocks)
    splitter = replace(base.batch_splitter, replicas=replicas, micro_batches=count)
    return replace(base, run=run.resolve(3, stages), layout=layout, batch_splitter=splitter)


@cache
def trained(
    objective: str, schedule: str, sync: str, stages: int, replicas: int, micros: int = 3
) -> Trained:
    """Train one cell, once for all the laws that compare it."""
    plan = cell_plan(objective, schedule, stages, replicas, micros)
    choice = tiny.run(sync={"name": sync, **FIELDS.get(sync, {})}).sync
    plan = replace(plan, run=replace(plan.run, sync=choice))
    hosts = [f"n{rank // stages}" for rank in range(stages * replicas)]  # each replica has a node
    results = run_ranks(len(hosts), lambda comm: train_rank(plan, comm), seed=stages, hosts=hosts)
    loss: list[dict[int, float]] = [{} for _ in range(replicas)]
    for replica, _, losses in results:
        loss[replica] |= losses
    weights: dict[str, Tensor] = {}
    for replica, tensors, _ in results:
        if replica == 0:
            weights |= tensors
    return Trained(weights, loss)


def on_one_stage(
    objective: str, schedule: str, sync: str, replicas: int = 2, micros: int = 3
) -> Trained:
    """Train on one stage, once for all the schedules that train the same bits there."""
    if not SCHEDULES[schedule].asynchronous:
        schedule = FIRST[objective]
    return trained(objective, schedule, sync, 1, replicas, micros)


def train_rank(plan: Plan, comm: Comm) -> tuple[int, dict[str, Tensor], Mapping[int, float]]:
    """Train one rank; return its replica, its part of the evaluated weights, and its losses."""
    job, run = build_rank(plan, comm), plan.run
    sequence = epoch_order(plan.data.train.size, run.settings.seed, 0, run.data.shuffle)
    offsets = range(plan.training_length.total_updates)
    batches = [plan.batch_splitter.batch(sequence, i, job.position.replica) for i in offsets]
    assert len(list(job.engine.run(job.train_loader, batches, 0, 0))) == len(batches) == 3
    weights: dict[str, Tensor] = {}
    for sync in job.engine.syncs.values():
        sync.finish_pending()
        weights |= sync.evaluation_weights()
    return job.position.replica, weights, job.engine.metric_sums.loss


def assert_equal(one: Trained, other: Trained) -> None:
    """Assert the same bits."""
    assert one.weights.keys() == other.weights.keys()
    for name, tensor in one.weights.items():
        assert torch.equal(tensor, other.weights[name]), name
    assert one.loss == other.loss


def assert_close(one: Trained, other: Trained) -> None:
    """Assert the same up to rounding."""
    assert one.weights.keys() == other.weights.keys()
    for name, tensor in one.weights.items():
        torch.testing.assert_close(tensor, other.weights[name], rtol=1e-12, atol=1e-13)


def test_the_cover_holds_every_pair_of_strategies() -> None:
    for first, second in itertools.combinations(range(3), 2):
        everything = {(cell[first], cell[second]) for cell in PRODUCT}
        assert {(cell[first], cell[second]) for cell in CELLS} == everything
    assert {cell[:2] for cell in PRODUCT} == set(PAIRS)
    assert harness.FULL or len(CELLS) < len(PRODUCT) / 3


@pytest.mark.parametrize(("objective", "schedule", "sync"), CELLS)
def test_any_number_of_stages_trains_the_same_bits(
    objective: str, schedule: str, sync: str
) -> None:
    """Law 1 over stages, losses included: three of them, and one, where all blocks are.

    The single stage runs one synchronous schedule for all of them, so this is also the law that
    synchronous schedules train the same bits.
    """
    one = on_one_stage(objective, schedule, sync)
    three = trained(objective, schedule, sync, 3, 2)
    assert_equal(one, three)
    assert [sorted(losses) for losses in one.loss] == [sorted(one.loss[0])] * 2


UNEVEN = [
    (objective, schedule)
    for objective, schedule in PAIRS
    if harness.FULL
    or objective in tiny.PATTERNS
    or schedule == OBJECTIVES[objective]().default_schedule
]
"""The schedules of each pattern of routes, and each objective in one of them."""


@pytest.mark.parametrize(("objective", "schedule"), UNEVEN)
def test_stages_may_be_uneven(objective: str, schedule: str) -> None:
    """Three blocks on 1 and 2 stages, each in the cell's own order."""
    one, two = (trained(objective, schedule, "every-step", n, 2) for n in (1, 2))
    assert_equal(one, two)


@pytest.mark.parametrize(
    ("objective", "schedule"),
    [("mono-forward", "stream"), ("backprop", "1f1b"), ("dfa", "pipelined")],
)
def test_stages_train_the_same_bits_without_replicas(objective: str, schedule: str) -> None:
    one, two, three = (trained(objective, schedule, "every-step", n, 1) for n in (1, 2, 3))
    assert_equal(one, two)
    assert_equal(one, three)


@pytest.mark.parametrize(
    ("objective", "schedule", "sync"),
    harness.pairwise(
        [
            cell
            for cell in SYNCHRONOUS
            if cell[2] == "every-step"
            or (cell[0] in tiny.NEIGHBOURS and not traits_of(cell[2]).lossy)
        ]
    ),
)
def test_one_micro_batch_equals_four(objective: str, schedule: str, sync: str) -> None:
    """Law 3: to rounding, and not by luck to the bit; a code may round either way."""
    one = on_one_stage(objective, schedule, sync, micros=1)
    four = trained(objective, schedule, sync, 2, 2, 4)
    assert_close(one, four)
    assert any(not torch.equal(tensor, four.weights[name]) for name, tensor in one.weights.items())


@pytest.mark.parametrize(("objective", "schedule", "sync"), CELLS)
def test_replicas_that_always_agree_are_one(objective: str, schedule: str, sync: str) -> None:
    """Law 1 over replicas, where they never differ; where they may, they do."""
    one = on_one_stage(objective, schedule, sync, 1)
    two = trained(objective, schedule, sync, 3, 2)
    # Closed forms of random features: their sums are added over all replicas, whatever the sync.
    traits = traits_of(sync)
    if not (traits.replicas_diverge or traits.lossy) or objective == "cafo":
        assert_close(one, two)
    else:
        with pytest.raises(AssertionError):
            assert_close(one, two)


@pytest.mark.parametrize(("objective", "schedule"), PAIRS[::4])
def test_a_cell_is_what_a_run_is_planned_as(objective: str, schedule: str) -> None:
    plan = cell_plan(objective, schedule, 3, 2, 3)
    whole = make_plan(cell_run(objective, schedule, 3, 3), 6)
    assert replace(plan, proof=whole.proof, data=whole.data, layout=whole.layout) == whole
    model = whole.layout.model
    assert replace(plan.layout, model=model) == replace(whole.layout, model=model)


@pytest.mark.parametrize(
    ("objective", "schedule"), sorted({*itertools.product(OBJECTIVES, SCHEDULES)} - {*PAIRS})
)
@pytest.mark.parametrize("stages", [1, 3])
def test_a_schedule_refuses_routes_that_it_cannot_run(
    objective: str, schedule: str, stages: int
) -> None:
    with pytest.raises(DtrainError) as error:
        make_plan(cell_run(objective, schedule, stages, 3), stages)
    assert error.value.key.startswith("schedule.")
