"""Law of memory: what a plan promises is what a run counts; and no rank holds another's weights."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from dtrain.build import build_rank
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.objectives import OBJECTIVES
from dtrain.planning.memory import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.train import train
from tests import tiny

HERE = "tests.ranks.test_memory"
NETS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "widths": [96, 80, 64, 48]},
    "cnn": {"name": "cnn", "widths": [[8, 8, 8, 8, 8], [12, 12, 12, 12]]},
    "resnet": {"name": "resnet", "depth": 14, "width": 4},
    "drop": {"name": f"{HERE}:dropping"},
}
OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "sgd", "lr": 1e-3},
    {"name": "sgd", "lr": 1e-3, "momentum": 0.9},
    {"name": "adam", "lr": 1e-3},
]
PAIRS = [
    (objective, schedule)
    for objective, schedule in itertools.product(OBJECTIVES, SCHEDULES)
    if SCHEDULES[schedule]().supports_all(OBJECTIVES[objective]().routes(3, "train"))
]
# stages, replicas, recompute
GRIDS = [(1, 1, False), (2, 1, False), (3, 1, False), (2, 2, False), (1, 2, True), (3, 1, True)]


def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 160 training and 40 test images of 12 x 12 pixels."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 3, 12, 12)).astype("float32")
    y = random.integers(0, 5, 200)
    return x[:160], y[:160], x[160:], y[160:]


def dropping() -> nn.Sequential:
    """Return a net with dropout and batch statistics."""
    wide = nn.Sequential(nn.Linear(128, 96), nn.Dropout(0.1), nn.Tanh())
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(432, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        wide,
        nn.Linear(96, 64),
        nn.Dropout(0.2),
        nn.Linear(64, 5),
    )


def run(net: str, objective: str, schedule: str, **told: Any) -> RunConfig:
    """Return a run whose activations are a good part of its memory."""
    # Where micro-batches of several updates live together, a plan takes all for full ones, and
    # two messages of a route for under way: so all are full here, and small.
    stale = issubclass(SCHEDULES[schedule], AsyncSchedule)
    rows = {"batch_size": 16 if stale else 32, "micro_batches": 1 if stale else 4}
    return tiny.run(
        data={"name": f"{HERE}:pictures"},
        model=NETS[net],
        objective={"name": objective},
        schedule={"name": schedule},
        dtype="float32",
        **rows,
        **told,
    )


CASES = [
    (*pair, list(NETS)[(one + two) % 4], OPTIMIZERS[(one + 2 * two) % 3], *grid)
    for (one, pair), (two, grid) in itertools.product(enumerate(PAIRS), enumerate(GRIDS))
    if pair in (("mono-forward", "stream"), ("backprop", "1f1b"))
    or (
        two == one % 6
        and (pair[0] in tiny.PATTERNS or pair[1] == OBJECTIVES[pair[0]]().default_schedule)
    )
]
"""Two pairs on all grids; on one of them, in turns, every objective in its own order, and one for
each pattern of messages in all orders."""


def words(case: tuple[Any, ...]) -> str:
    """Return the name of a case."""
    objective, schedule, net, optimizer, stages, replicas, recompute = case
    momentum = "-momentum" if "momentum" in optimizer else ""
    again = "-recompute" if recompute else ""
    return f"{objective}-{schedule}-{net}-{optimizer['name']}{momentum}-{stages}x{replicas}{again}"


@pytest.mark.parametrize("case", CASES, ids=words)
def test_planned_memory_is_counted_memory(case: tuple[Any, ...], tmp_path: Path) -> None:
    """Within 10 % on every rank, whatever is trained, and how.

    Blocks of several layers: a message more or less under way, which timing decides, is less.
    """
    objective, schedule, net, optimizer, stages, replicas, recompute = case
    part = {"blocks": 3, "balance": "layers", "recompute": recompute}
    told = {"optimizer": optimizer, "partition": part, "mesh__stages": stages}
    asked = run(net, objective, schedule, **told)
    planned = [each.peak for each in MemoryPlan(make_plan(asked, stages * replicas)).rank_memory()]

    def work(comm: Comm) -> Any:
        return train(asked, comm, tmp_path)

    counted = ranks(stages * replicas, work)[0]["peak_memory_bytes"]
    for one, other in zip(planned, counted, strict=True):
        assert abs(one / other - 1) < 0.1, (planned, counted)


def test_memory_is_planned_though_updates_of_two_ranks_end_together() -> None:
    for stages in (2, 3):
        asked = tiny.run(objective__name="man", mesh__stages=stages, batch_size=4)
        assert min(each.messages for each in MemoryPlan(make_plan(asked, stages)).rank_memory()) > 0


def test_recomputation_is_planned_to_take_less() -> None:
    """What it is for: many live micro-batches of a deep block."""
    peaks = []
    for recompute in (False, True):
        told = {"partition": {"blocks": 3, "recompute": recompute}, "mesh__stages": 1}
        asked = run("resnet", "backprop", "fill-drain", **told)
        peaks.append(MemoryPlan(make_plan(asked, 1)).rank_memory()[0].live)
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize("net", ["mlp", "drop"])
def test_a_rank_holds_no_weights_of_another_stage(net: str) -> None:
    """Of a listed model they are never made; a whole one is made, then given back at once.

    Without the cycle collector, so that what a rank let go of does not linger in a run either.
    """
    asked = run(net, "mono-forward", "stream", mesh__stages=2, partition={"blocks": 2})
    backend = SingleBackend()
    backend.hosts = (*backend.hosts, *backend.hosts)  # of two stages on one host ...
    comm = Comm(backend)
    comm.rank = 1  # ... the second one
    gc.collect()
    before = weights()
    known = {id(each) for each in before}
    gc.disable()
    try:
        job = build_rank(make_plan(asked, 2), comm)
        found = [each for each in weights() if id(each) not in known]
    finally:
        gc.enable()
    assert list(job.engine.blocks) == [1]
    block = job.engine.blocks[1]
    own = {each.untyped_storage().data_ptr() for each in block.parameters.values()}
    assert own
    assert {each.untyped_storage().data_ptr() for each in found} == own


def weights() -> list[nn.Parameter]:
    """Return all parameters that live in this process and take memory."""
    return [
        each
        for each in gc.get_objects()
        if type(each) is nn.Parameter and not each.is_meta and each.untyped_storage().nbytes()
    ]
