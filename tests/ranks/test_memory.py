"""The planned memory is the counted memory, and no rank holds the weights of another stage."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from dtrain.build import RankJob, build_rank
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.objectives import OBJECTIVES
from dtrain.planning.memory_plan import MemoryPlan
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES
from tests import tiny
from tests.harness import pairs, train_in_threads
from tests.ranks.test_graph_models import run as graph_run

HERE = "tests.ranks.test_memory"
MODELS: dict[str, dict[str, Any]] = {
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
MODEL_OF = {"dual-propagation": "mlp"}
"""The models of objectives that refuse the others."""

LARGE_EVALUATIONS = ("forward-forward", "layer-collaboration")
"""Objectives that send every candidate class in an evaluation. Its messages are in flight beside
the live micro-batches of the next epoch, so one epoch takes less than the plan."""

GRIDS = [(1, 1, False), (2, 1, False), (3, 1, False), (2, 2, False), (1, 2, True), (3, 1, True)]
"""Stages, replicas, recompute."""


def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 160 training and 24 test images of 12 x 12 pixels."""
    random = np.random.default_rng(0)
    x = random.normal(size=(184, 3, 12, 12)).astype("float32")
    y = random.integers(0, 5, 184)
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


def make_run(model: str, objective: str, schedule: str, **changes: Any) -> RunConfig:
    """Return a run whose activations are a good part of its memory."""
    # Where micro-batches of several updates are live together, the plan takes all for full ones,
    # and counts two messages of a route as in flight: so here all are full, and small, and two
    # epochs let the ranks come that far apart.
    if SCHEDULES[schedule].delays_count_micro_batches:
        sizes = {"batch_size": 16, "micro_batches": 1, "epochs": 2}
    else:
        epochs = 2 if objective in LARGE_EVALUATIONS else 1
        sizes = {"batch_size": 32, "micro_batches": 4, "epochs": epochs}
    return tiny.run(
        data={"name": f"{HERE}:pictures"},
        model=MODELS[model],
        objective={"name": objective},
        schedule={"name": schedule},
        dtype="float32",
        **sizes,
        **changes,
    )


PAIRS = [pair for pair in pairs() if pair[1] not in ("interleaved", "fold")]
"""test_places.py has these two, with as many blocks as make a loop and a V."""
CASES = [
    (*pair, MODEL_OF.get(pair[0], list(MODELS)[(i + j) % 4]), OPTIMIZERS[(i + 2 * j) % 3], *grid)
    for (i, pair), (j, grid) in itertools.product(enumerate(PAIRS), enumerate(GRIDS))
    if pair in (("mono-forward", "stream"), ("backprop", "1f1b"))
    or (
        j == i % 6
        and (pair[0] in tiny.PATTERNS or pair[1] == OBJECTIVES[pair[0]]().default_schedule)
    )
]
"""Two pairs on all grids. On one grid, in turns, every objective in its default schedule, and one
objective for each pattern of messages in all these schedules."""


def case_name(case: tuple[Any, ...]) -> str:
    objective, schedule, model, optimizer, stages, replicas, recompute = case
    momentum = "-momentum" if "momentum" in optimizer else ""
    again = "-recompute" if recompute else ""
    return (
        f"{objective}-{schedule}-{model}-{optimizer['name']}{momentum}-{stages}x{replicas}{again}"
    )


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_planned_memory_is_counted_memory(case: tuple[Any, ...], tmp_path: Path) -> None:
    """Within 10 % on every rank, for every objective and schedule.

    Blocks of several layers: one message more or less in flight, which timing decides, is less.
    """
    objective, schedule, model, optimizer, stages, replicas, recompute = case
    partition = {"blocks": 3, "balance": "layers", "recompute": recompute}
    changes = {"optimizer": optimizer, "partition": partition, "mesh__stages": stages}
    run = make_run(model, objective, schedule, **changes)
    memory = MemoryPlan(make_plan(run, stages * replicas)).rank_memory()
    summary = train_in_threads(run, tmp_path, stages=stages, replicas=replicas)
    planned, counted = [rank.peak for rank in memory], summary["peak_memory_bytes"]
    for planned_bytes, counted_bytes in zip(planned, counted, strict=True):
        assert abs(planned_bytes / counted_bytes - 1) < 0.1, (planned, counted)


@pytest.mark.parametrize("net", ["skips", "lazy", "tied", "masked_mean"])
def test_planned_memory_of_small_blocks_is_counted_memory(net: str, tmp_path: Path) -> None:
    """Messages are most of it: skips, gradients of tied parameters, further inputs of a sample.

    One message more or less in flight is more than 10 % here, and the order of the ranks decides:
    the plan holds for the worst of several orders.
    """
    planned = make_plan(graph_run(net, mesh__stages=3, micro_batches=4, epochs=1), 3)
    memory = MemoryPlan(planned).rank_memory()
    run = graph_run(net, micro_batches=4, epochs=1)
    peaks = [
        train_in_threads(run, tmp_path / str(seed), stages=3, seed=seed)["peak_memory_bytes"]
        for seed in range(4)
    ]
    counted = [max(of_rank) for of_rank in zip(*peaks, strict=True)]
    for rank, counted_bytes in zip(memory, counted, strict=True):
        assert abs(rank.peak / counted_bytes - 1) < 0.1, (memory, counted)


def test_memory_is_planned_though_updates_of_two_ranks_end_together() -> None:
    for stages in (2, 3):
        run = tiny.run(objective__name="man", mesh__stages=stages, batch_size=4)
        memory = MemoryPlan(make_plan(run, stages)).rank_memory()
        assert min(rank.messages for rank in memory) > 0


def test_recomputation_is_planned_to_take_less() -> None:
    """Its purpose: many live micro-batches of a deep block."""
    live_bytes = []
    for recompute in (False, True):
        changes = {"partition": {"blocks": 3, "recompute": recompute}, "mesh__stages": 1}
        run = make_run("resnet", "backprop", "fill-drain", **changes)
        live_bytes.append(MemoryPlan(make_plan(run, 1)).rank_memory()[0].live)
    assert live_bytes[1] < live_bytes[0] / 2


@pytest.mark.parametrize("model", ["mlp", "drop"])
def test_a_rank_holds_no_weights_of_another_stage(model: str) -> None:
    """Two ranks together hold every weight once.

    The layers of a listed model are never made for another stage; a whole model is made, then
    freed at once: without the cycle collector, so that it does not linger in a run either.
    """
    run = make_run(model, "mono-forward", "stream", mesh__stages=2, partition={"blocks": 2})

    def build(comm: Comm) -> dict[int, list[int]]:
        job = build_rank(make_plan(run, 2), comm)
        jobs.append(job)
        return {index: storages(*b.parameters.values()) for index, b in job.engine.blocks.items()}

    gc.collect()
    before = set(storages(*living_parameters()))
    jobs: list[RankJob] = []
    gc.disable()
    try:
        first, second = run_ranks(2, build)
        after = storages(*living_parameters())
    finally:
        gc.enable()
    assert [*first, *second] == [0, 1]
    assert sorted(set(after) - before) == sorted([*first[0], *second[1]])


def living_parameters() -> list[nn.Parameter]:
    """Return all parameters of this process that take memory."""
    return [
        item
        for item in gc.get_objects()
        if type(item) is nn.Parameter and not item.is_meta and item.untyped_storage().nbytes()
    ]


def storages(*parameters: nn.Parameter) -> list[int]:
    return [parameter.untyped_storage().data_ptr() for parameter in parameters]
