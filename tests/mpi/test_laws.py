"""The laws of training over MPI: groups of one world train side by side, one start for all."""

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
CHOSEN = ("mono-forward", "backprop", "dfa", "f3")


def legal(cell: Cell) -> bool:
    """Say whether the schedule runs all that the objective sends, and with this sync."""
    routes = OBJECTIVES[cell[0]]().routes(3, "train")
    return SCHEDULES[cell[1]]().supports_all(routes) and cell[2] in tiny.suited(cell[1])


def cover(cells: Sequence[Cell]) -> list[Cell]:
    """Return cells in which every choice occurs, and every schedule with every dtype.

    A start costs seconds and there are ever more strategies: the whole product runs in process. The
    cell that brings most that is new comes next.
    """

    def marks(cell: Cell) -> set[tuple[str, ...]]:
        objective, schedule, sync, dtype = cell
        return {("objective", objective), ("sync", sync), ("schedule", schedule, dtype)}

    missing, chosen = set().union(*map(marks, cells)), []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(marks(cell) & missing)))
        missing -= marks(chosen[-1])
    return chosen


ALL = product(CHOSEN, SCHEDULES, SYNCS, ("float32", "float64"))
CELLS = cover([cell for cell in ALL if legal(cell)])


def digits(stages: int, objective: str = "mono-forward", **top: Any) -> RunConfig:
    """Return a run on digits: batches of 256 in three micro-batches, the last one of 157."""
    schedule, sync = top.pop("schedule", None), top.pop("sync", "every-step")
    kind = SCHEDULES[schedule or OBJECTIVES[objective]().default_schedule]
    micros = 1 if issubclass(kind, AsyncSchedule) else 3  # some update after each
    top = {"epochs": 1, "batch-size": 256, "micro-batches": micros, "threads": 1} | top
    table = {
        **top,
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
    part = comm.split(int(comm.rank >= ranks), comm.rank)
    if comm.rank < ranks:
        train(run, part, out)
    comm.allgather_object("trained")
    return summary(out)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("objective", "schedule", "sync", "dtype"), CELLS)
def test_any_number_of_stages_trains_the_same_bits(
    objective: str, schedule: str, sync: str, dtype: str, comm: Comm, tmp_path: Path
) -> None:
    """Law 1 over stages, of one replica and of two; two ranks hold four layers unevenly."""
    told = {"objective": objective, "schedule": schedule, "sync": sync, "dtype": dtype}

    def run(stages: int, replicas: int) -> dict[str, Any]:
        out = tmp_path / f"{stages}-{replicas}"
        return trained(comm, stages * replicas, digits(stages, **told), out)

    for layouts in (((1, 1), (2, 1), (3, 1)), ((1, 2), (2, 2))):
        found = [run(*layout) for layout in layouts]
        assert [(each["stages"], each["replicas"]) for each in found] == list(layouts)
        assert len({each["digest"] for each in found}) == 1
        assert {each["samples"] for each in found} == {1437}


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("objective", CHOSEN)
def test_replicas_train_the_same_model(objective: str, comm: Comm, tmp_path: Path) -> None:
    """Law 1 over replicas, from the same run file, in float64."""
    run = digits(2, objective, dtype="float64")
    outs = [Path(comm.allgather_object(str(tmp_path / f"{ranks}"))[0]) for ranks in (2, 4)]
    for ranks, out in zip((2, 4), outs, strict=True):
        trained(comm, ranks, run, out)
    close(*outs)


@pytest.mark.mpi(min_size=4)
def test_resumed_is_uninterrupted(comm: Comm, tmp_path: Path) -> None:
    """Law 5 on the same layout, 2 stages x 2 replicas."""
    for epochs in (1, 3):
        parts = trained(comm, 4, digits(2, epochs=epochs), tmp_path / "parts")
    whole = trained(comm, 4, digits(2, epochs=3), tmp_path / "whole")
    for key in ("digest", "test_accuracy", "test_loss", "train_loss", "samples"):
        assert parts[key] == whole[key], key
    assert (parts["attempts"], whole["attempts"]) == (2, 1)
