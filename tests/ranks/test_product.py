"""The product of all objectives, schedules and syncs: laws 1 and 3 in every cell.

Invariant: a cell is a whole segment walk of one run on ranks as threads, without a run folder,
since what is written and evaluated does not depend on the strategy. A strategy is covered by being
in its dict. What is compared is made once: blocks are counted once for each objective; of its
synchronous schedules, which train the same bits, one is trained on a single stage; each cell by
itself is trained on three alone::

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
from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data.sampler import epoch_order
from dtrain.errors import DtrainError
from dtrain.mesh import Mesh
from dtrain.objectives import OBJECTIVES
from dtrain.planning.plan import Plan, make_plan
from dtrain.schedules import SCHEDULES
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.syncs import SYNCS
from dtrain.syncs.common.wrapper import Wrapper
from tests import tiny

NET: dict[str, Any] = {
    "model__widths": [9, 7, 6],
    "partition": {"cuts": [1, 2]},  # named, since a balance asks for the price of every cut
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
"""What a sync needs in order to act within three updates. Each replica is on a node of its own."""
MADE = {name: tiny.run(sync={"name": name, **FIELDS.get(name, {})}).sync.instance for name in SYNCS}


class Trained(NamedTuple):
    """What a cell ends with: the tensors of the view, and the losses of each replica by block."""

    view: dict[str, Tensor]
    loss: list[dict[int, float]]


def legal(objective: str, schedule: str) -> bool:
    """Say whether a schedule runs all that an objective sends."""
    return SCHEDULES[schedule]().supports_all(OBJECTIVES[objective]().routes(3, "train"))


ALL = list(itertools.product(OBJECTIVES, SCHEDULES))
PAIRS = [pair for pair in ALL if legal(*pair)]
WRAPPERS = {name for name, kind in SYNCS.items() if issubclass(kind, Wrapper)}
"""They see no more than what others send: one objective of each pattern is enough."""
CELLS = [
    (*pair, sync)
    for pair in PAIRS
    for sync in SYNCS
    if sync not in WRAPPERS or pair[0] in tiny.PATTERNS
    if not (MADE[sync].traits().reparametrises and SCHEDULES[pair[1]].asynchronous)
]
# Law 3 is for what is synchronous: nothing is learnt with weights that it did not see.
SYNCHRONOUS = [cell for cell in CELLS if not SCHEDULES[cell[1]].asynchronous]
FIRST = {objective: schedule for objective, schedule, _ in reversed(SYNCHRONOUS)}
"""The synchronous schedule of an objective that stands for all of them on one stage."""


def asked(objective: str, schedule: str, stages: int, micros: int) -> RunConfig:
    """Return the run of a cell, whatever its sync."""
    named = {"objective__name": objective, "schedule__name": schedule}
    micros = (
        1 if issubclass(SCHEDULES[schedule], AsyncSchedule) else micros
    )  # it updates after each
    return tiny.run(**NET, **named, micro_batches=micros, mesh__stages=stages)


@cache
def priced(objective: str) -> Plan:
    """Return a plan of an objective: what its blocks are and cost is the same in all of them."""
    return make_plan(asked(objective, FIRST[objective], 1, 1), 1)


@cache
def planned(objective: str, schedule: str, stages: int, replicas: int, micros: int) -> Plan:
    """Return the plan of a cell, of blocks that were counted before."""
    known, run = priced(objective), asked(objective, schedule, stages, micros)
    kind, count = run.schedule.instance, run.settings.micro_batches
    place = kind.assign_stages([part.cost for part in known.layout.block_layouts], stages)
    mesh = Mesh.for_ranks(stages * replicas, stages, run.mesh.placement)
    layout = replace(known.layout, mesh=mesh, schedule=kind, place=place)
    shares = replace(known.batch_splitter, replicas=replicas, micro_batches=count)
    return replace(known, run=run.resolve(3, stages), layout=layout, batch_splitter=shares)


@cache
def trained(
    objective: str, schedule: str, sync: str, stages: int, replicas: int, micros: int = 3
) -> Trained:
    """Train one cell, once for all the laws that look at it."""
    agreed = planned(objective, schedule, stages, replicas, micros)
    chosen = tiny.run(sync={"name": sync, **FIELDS.get(sync, {})}).sync
    agreed = replace(agreed, run=replace(agreed.run, sync=chosen))
    hosts = [f"n{rank // stages}" for rank in range(stages * replicas)]  # each replica has a node
    told = ranks(len(hosts), lambda comm: walked(agreed, comm), seed=stages, hosts=hosts)
    loss: list[dict[int, float]] = [{} for _ in range(replicas)]
    for replica, _, losses in told:
        loss[replica] |= losses
    views = [view for replica, view, _ in told if replica == 0]
    return Trained({name: each for view in views for name, each in view.items()}, loss)


def alone(objective: str, schedule: str, sync: str, replicas: int = 2, micros: int = 3) -> Trained:
    """Train on one stage, once for all the schedules that train the same bits there."""
    if not SCHEDULES[schedule].asynchronous:
        schedule = FIRST[objective]
    return trained(objective, schedule, sync, 1, replicas, micros)


def walked(agreed: Plan, comm: Comm) -> tuple[int, dict[str, Tensor], Mapping[int, float]]:
    """Train one rank; return its replica, its part of the view, and its losses."""
    job, run = build_rank(agreed, comm), agreed.run
    sequence = epoch_order(agreed.data.train.size, run.settings.seed, 0, run.data.shuffle)
    offsets = range(agreed.training_length.total_updates)
    batches = [
        agreed.batch_splitter.batch(sequence, each, job.position.replica) for each in offsets
    ]
    assert len(list(job.engine.run(job.train_loader, batches, 0, 0))) == len(batches) == 3
    view: dict[str, Tensor] = {}
    for sync in job.engine.syncs.values():
        sync.finish_pending()
        view |= sync.evaluation_weights()
    return job.position.replica, view, job.engine.metric_sums.loss


def equal(one: Trained, other: Trained) -> None:
    """Assert the same bits."""
    assert one.view.keys() == other.view.keys()
    for name, tensor in one.view.items():
        assert torch.equal(tensor, other.view[name]), name
    assert one.loss == other.loss


def close(one: Trained, other: Trained) -> None:
    """Assert the same up to rounding."""
    assert one.view.keys() == other.view.keys()
    for name, tensor in one.view.items():
        torch.testing.assert_close(tensor, other.view[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("objective", "schedule", "sync"), CELLS)
def test_any_number_of_stages_trains_the_same_bits(
    objective: str, schedule: str, sync: str
) -> None:
    """Law 1 over stages, losses included: three of them, and one, where all blocks are."""
    one, three = alone(objective, schedule, sync), trained(objective, schedule, sync, 3, 2)
    equal(one, three)
    assert [sorted(each) for each in one.loss] == [sorted(one.loss[0])] * 2


@pytest.mark.parametrize(("objective", "schedule"), PAIRS)
def test_stages_may_be_uneven(objective: str, schedule: str) -> None:
    """Three blocks on 1, 2 and 3 stages, each in the cell's own order."""
    one, two, three = (trained(objective, schedule, "every-step", n, 2) for n in (1, 2, 3))
    equal(one, two)
    equal(one, three)


@pytest.mark.parametrize(("objective", "schedule"), PAIRS[::3])
def test_stages_train_the_same_bits_without_replicas(objective: str, schedule: str) -> None:
    one, two, three = (trained(objective, schedule, "every-step", n, 1) for n in (1, 2, 3))
    equal(one, two)
    equal(one, three)


@pytest.mark.parametrize(
    ("objective", "schedule", "sync"),
    [
        cell
        for cell in SYNCHRONOUS
        if cell[2] == "every-step"
        or (cell[0] in tiny.NEIGHBOURS and not MADE[cell[2]].traits().lossy)
    ],
)
def test_one_micro_batch_equals_four(objective: str, schedule: str, sync: str) -> None:
    """Law 3: to rounding, and not by luck to the bit; a code may round either way."""
    one = alone(objective, schedule, sync, micros=1)
    four = trained(objective, schedule, sync, 2, 2, 4)
    close(one, four)
    assert any(not torch.equal(each, four.view[name]) for name, each in one.view.items())


@pytest.mark.parametrize(("objective", "sync"), sorted({(a, c) for a, _, c in SYNCHRONOUS}))
def test_synchronous_schedules_train_the_same_bits(objective: str, sync: str) -> None:
    """All learn in the order of micro-batches."""
    names = [each for name, each, other in SYNCHRONOUS if (name, other) == (objective, sync)]
    first, *others = (trained(objective, name, sync, 3, 2) for name in names)
    assert others or names == ["drained"]
    for other in others:
        equal(first, other)


@pytest.mark.parametrize(("objective", "schedule", "sync"), CELLS)
def test_replicas_that_always_agree_are_one(objective: str, schedule: str, sync: str) -> None:
    """Law 1 over replicas, where they never differ; where they do, they really train apart."""
    one, two = alone(objective, schedule, sync, 1), trained(objective, schedule, sync, 3, 2)
    # Closed forms of random features: their sums are added over all replicas, whatever the sync.
    made = MADE[sync].traits()
    if not (made.replicas_diverge or made.lossy) or objective == "cafo":
        close(one, two)
    else:
        with pytest.raises(AssertionError):
            close(one, two)


@pytest.mark.parametrize(("objective", "schedule"), PAIRS[::4])
def test_a_cell_is_what_a_run_is_planned_as(objective: str, schedule: str) -> None:
    made = planned(objective, schedule, 3, 2, 3)
    whole = make_plan(asked(objective, schedule, 3, 3), 6)
    assert replace(made, proof=whole.proof, data=whole.data, layout=whole.layout) == whole
    model = whole.layout.model
    assert replace(made.layout, model=model) == replace(whole.layout, model=model)


@pytest.mark.parametrize(("objective", "schedule"), sorted(set(ALL) - set(PAIRS)))
@pytest.mark.parametrize("stages", [1, 3])
def test_what_a_schedule_cannot_run_is_refused_in_its_words(
    objective: str, schedule: str, stages: int
) -> None:
    kind, routes = SCHEDULES[schedule], OBJECTIVES[objective]().routes(3, "train")
    bad = any(not kind().supports(route) for route in routes)
    told = r"the route .* cannot be scheduled" if bad else "nothing comes back .* never late"
    with pytest.raises(DtrainError, match=told) as refusal:
        make_plan(asked(objective, schedule, stages, 3), stages)
    assert not bad or kind.unsupported_routes in refusal.value.message
