"""Tools of the tests that train: runs on threads, legal combinations of strategies, comparisons.

`train_in_threads(config, out, 2, 3)`
    Trains two stages of three replicas, with ranks as threads, and returns the summary.
`some(values, number)`
    A third of the values, the next third for the next number.
`pairs()`, `cells()`, `pairwise(cells)`
    The legal (objective, schedule) and (objective, schedule, sync), and a subset of cells in which
    every pair of strategies that occurs together still does. `DTRAIN_FULL=1` keeps all cells.
`assert_same_model(out, other)`, `assert_close_model(out, other)`
    Compare the newest checkpoints of two run folders, to the bit or up to rounding.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.schedules import SCHEDULES
from dtrain.schedules.stream_replay import StreamReplay
from dtrain.syncs import SYNCS
from dtrain.training import train
from tests.outcome import close, model

FULL = os.environ.get("DTRAIN_FULL") == "1"
"""Whether products of strategies are run whole."""

Cell = TypeVar("Cell", bound=tuple[Hashable, ...])
Value = TypeVar("Value")


def train_in_threads(
    config: RunConfig,
    out: Path,
    stages: int | None = None,
    replicas: int = 1,
    *,
    hosts: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train `config` on stages x replicas threads and return the summary.

    Parameters
    ----------
    stages : int, optional
        Those of the run file by default, else 1.
    hosts : sequence of str, optional
        The host of every rank; one host by default.
    seed : int
        Of the order in which the threads take turns.
    """
    count = (stages or config.mesh.stages or 1) * replicas

    def work(comm: Comm) -> dict[str, Any]:
        return train(config, comm, out)

    return run_ranks(count, work, seed=seed, hosts=None if hosts is None else list(hosts))[0]


@cache
def is_legal(objective: str, schedule: str) -> bool:
    """Return whether a schedule runs every route of an objective, with the data that it needs."""
    kind = OBJECTIVES[objective]()
    if SCHEDULES[schedule] is StreamReplay:
        inner = BlockSpec(1, 3, (4,), (4,), torch.float32, 2)
        if kind.needs_samples(inner, "train"):
            return False
    return SCHEDULES[schedule]().supports_all(kind.routes(3, "train"))


def pairs() -> list[tuple[str, str]]:
    """Return the legal pairs of objective and schedule."""
    return [pair for pair in itertools.product(OBJECTIVES, SCHEDULES) if is_legal(*pair)]


def cells(syncs: Sequence[str] = tuple(SYNCS)) -> list[tuple[str, str, str]]:
    """Return the legal triples of objective, schedule and sync."""
    return [
        (objective, schedule, sync)
        for objective, schedule in pairs()
        for sync in syncs
        if not (SYNCS[sync]().traits().reparametrises and SCHEDULES[schedule].asynchronous)
    ]


def pairwise(cells: Sequence[Cell]) -> list[Cell]:
    """Return cells in which every pair of values that `cells` hold together is found.

    Greedy: the cell with the most pairs that are still missing comes next, the first of equals.
    """
    if FULL:
        return list(cells)
    missing = {cell: _pairs_of(cell) for cell in cells}
    cover = []
    while missing:
        best = max(missing, key=lambda cell: len(missing[cell]))
        gained = missing.pop(best)
        if not gained:
            break
        cover.append(best)
        missing = {cell: rest - gained for cell, rest in missing.items()}
    return sorted(cover, key=list(cells).index)


def some(values: Sequence[Value], number: int, parts: int = 3) -> list[Value]:
    """Return one of `parts` equal parts of the values: the next number gives the next part.

    A law of all (a, b, c) is checked with every pair (a, c) and (b, c) on
    `some(all_c, index_of_a + index_of_b)`, where there are at least `parts` a and b.
    """
    return list(values) if FULL else list(values[number % parts :: parts])


def _pairs_of(cell: tuple[Hashable, ...]) -> frozenset[tuple[Any, ...]]:
    """Return the pairs of values of a cell, each with its position."""
    return frozenset(itertools.combinations(enumerate(cell), 2))


def assert_same_model(out: Path, other: Path) -> None:
    """Assert that two runs ended in the same model, bit for bit."""
    ours, theirs = model(out), model(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


assert_close_model = close
