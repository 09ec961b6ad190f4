"""The laws of training over MPI, on groups of one world, which starts once for all tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dtrain.comm.communicator import Comm
from dtrain.config.parse import parse_run
from dtrain.config.run import RunConfig
from dtrain.objectives import OBJECTIVES
from dtrain.schedules import SCHEDULES
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.syncs import SYNCS
from dtrain.train import train
from tests import tiny
from tests.outcome import close, summary

Cell = tuple[str, str, str, str]
OBJECTIVE_NAMES = ("mono-forward", "backprop", "dfa", "f3")


def legal(cell: Cell) -> bool:
    """Return whether the schedule supports the routes of the objective, and the sync."""
    objective, schedule, sync, _ = cell
    routes = OBJECTIVES[objective]().routes(3, "train")
    return SCHEDULES[schedule]().supports_all(routes) and sync in tiny.suited(schedule)


def cover(cells: Sequence[Cell]) -> list[Cell]:
    """Return cells that contain every choice, and every schedule with every dtype (greedy cover).

    Runs over MPI cost seconds and the number of strategies grows, so the full product runs only in
    threads.
    """

    def choices(cell: Cell) -> set[tuple[str, ...]]:
        objective, schedule, sync, dtype = cell
        return {("objective", objective), ("sync", sync), ("schedule", schedule, dtype)}

    missing, selection = set().union(*map(choices, cells)), []
    while missing:
        selection.append(max(cells, key=lambda cell: len(choices(cell) & missing)))
        missing -= choices(selection[-1])
    return selection


ALL = product(OBJECTIVE_NAMES, SCHEDULES, SYNCS, ("float32", "float64"))
CELLS = cover([cell for cell in ALL if legal(cell)])


def digits_run(
    stages: int,
    objective: str = "mono-forward",
    schedule: str | None = None,
    sync: str = "every-step",
    **settings: Any,
) -> RunConfig:
    """Return a run on digits: batches of 256 in three micro-batches, the last one of 157."""
    kind = SCHEDULES[schedule or OBJECTIVES[objective]().default_schedule]
    micros = 1 if issubclass(kind, AsyncSchedule) else 3  # some update after each
    table = {
        **{"epochs": 1, "batch-size": 256, "micro-batches": micros, "threads": 1},
        **settings,
        "data": {"name": "digits"},
        "model": {"name": "mlp", "widths": [61, 47, 53]},
        "mesh": {"stages": stages},
        "partition": {"blocks": 3},
        "objective": {"name": objective},
        "schedule": {"name": schedule} if schedule else {},
        "sync": {"name": sync},
        "optimizer": {"name": "adam", "lr": 1e-3},
    }
    return parse_run(table, Path(__file__))


def trained(comm: Comm, ranks: int, run: RunConfig, out: Path) -> dict[str, Any]:
    """Train on the first `ranks` of `comm`, into rank 0's `out`; return the summary on all."""
    out = Path(comm.allgather_object(str(out))[0])
    group = comm.split(int(comm.rank >= ranks), comm.rank)
    if comm.rank < ranks:
        train(run, group, out)
    comm.allgather_object("trained")
    return summary(out)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("objective", "schedule", "sync", "dtype"), CELLS)
def test_any_number_of_stages_trains_the_same_bits(
    objective: str, schedule: str, sync: str, dtype: str, comm: Comm, tmp_path: Path
) -> None:
    """Law 1 over stages, of one replica and of two; two ranks hold four layers unevenly."""

    def train_on(stages: int, replicas: int) -> dict[str, Any]:
        run = digits_run(stages, objective, schedule, sync, dtype=dtype)
        return trained(comm, stages * replicas, run, tmp_path / f"{stages}-{replicas}")

    for layouts in (((1, 1), (2, 1), (3, 1)), ((1, 2), (2, 2))):
        summaries = [train_on(*layout) for layout in layouts]
        assert [(row["stages"], row["replicas"]) for row in summaries] == list(layouts)
        assert len({row["digest"] for row in summaries}) == 1
        assert {row["samples"] for row in summaries} == {1437}


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_replicas_train_the_same_model(objective: str, comm: Comm, tmp_path: Path) -> None:
    """Law 1 over replicas, from the same run file, in float64."""
    run = digits_run(2, objective, dtype="float64")
    outs = [Path(comm.allgather_object(str(tmp_path / f"{ranks}"))[0]) for ranks in (2, 4)]
    for ranks, out in zip((2, 4), outs, strict=True):
        trained(comm, ranks, run, out)
    close(*outs)


@pytest.mark.mpi(min_size=4)
def test_resumed_is_uninterrupted(comm: Comm, tmp_path: Path) -> None:
    """Law 5 on the same layout, 2 stages x 2 replicas."""
    for epochs in (1, 3):
        parts = trained(comm, 4, digits_run(2, epochs=epochs), tmp_path / "parts")
    whole = trained(comm, 4, digits_run(2, epochs=3), tmp_path / "whole")
    for key in ("digest", "test_accuracy", "test_loss", "train_loss", "samples"):
        assert parts[key] == whole[key], key
    assert (parts["attempts"], whole["attempts"]) == (2, 1)
