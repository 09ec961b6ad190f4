"""The laws of training over MPI, on groups of one world, which starts once for all tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.objectives import OBJECTIVES
from dtrain.schedules import SCHEDULES
from dtrain.syncs import SYNCS
from dtrain.training import train
from tests import tiny
from tests.outcome import close, summary
from tests.ranks.test_graph_models import run as graph_run

Cell = tuple[str, str, str, str]
OBJECTIVE_NAMES = ("mono-forward", "backprop", "dfa", "f3")


def legal(cell: Cell) -> bool:
    """Return whether the schedule supports the routes of the objective, and the sync."""
    objective, schedule, sync, _ = cell
    routes = OBJECTIVES[objective]().routes(3, "train")
    return SCHEDULES[schedule]().supports_all(routes) and sync in tiny.suited(schedule)


def cover(cells: Sequence[Cell]) -> list[Cell]:
    """Return cells that contain every choice of every kind (greedy cover).

    Runs over MPI cost seconds and the number of strategies grows, so pairs of strategies run only
    in threads.
    """
    missing, selection = set().union(*(set(enumerate(cell)) for cell in cells)), []
    while missing:
        selection.append(max(cells, key=lambda cell: len(set(enumerate(cell)) & missing)))
        missing -= set(enumerate(selection[-1]))
    return selection


ALL = product(OBJECTIVE_NAMES, SCHEDULES, SYNCS, ("float32", "float64"))
CELLS = cover([cell for cell in ALL if legal(cell)])


def run_of(
    stages: int,
    objective: str = "mono-forward",
    schedule: str | None = None,
    sync: str = "every-step",
    **settings: Any,
) -> RunConfig:
    """Return the tiny run with these strategies; batches of 16 leave a last one of 2 samples."""
    kind = SCHEDULES[schedule or OBJECTIVES[objective]().default_schedule]
    return tiny.run(
        micro_batches=1 if kind.delays_count_micro_batches else 3,  # some update after each
        mesh__stages=stages,
        objective__name=objective,
        schedule={"name": schedule} if schedule else {},
        sync__name=sync,
        **settings,
    )


def trained(comm: Comm, out: Path, *sizes: int, runs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Train runs side by side, each on the next `size` ranks; return their summaries on all ranks.

    Rank 0's `out` holds a run folder for each.
    """
    out = Path(comm.allgather_object(str(out))[0])
    places = [place for place, size in enumerate(sizes) for _ in range(size)]
    place = places[comm.rank] if comm.rank < len(places) else len(sizes)
    group = comm.split(place, comm.rank)
    if place < len(sizes):
        train(runs[place], group, out / str(place))
    comm.allgather_object(None)  # the summaries are written
    return [summary(out / str(number)) for number in range(len(sizes))]


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("objective", "schedule", "sync", "dtype"), CELLS)
def test_any_number_of_stages_trains_the_same_bits(
    objective: str, schedule: str, sync: str, dtype: str, comm: Comm, tmp_path: Path
) -> None:
    """Law 1 over stages, of one replica and of two; two ranks hold four layers unevenly."""
    digests: dict[int, set[str]] = {1: set(), 2: set()}
    for layouts in (((1, 1), (3, 1)), ((1, 2), (2, 1)), ((2, 2),)):
        runs = [run_of(stages, objective, schedule, sync, dtype=dtype) for stages, _ in layouts]
        sizes = [stages * replicas for stages, replicas in layouts]
        summaries = trained(comm, tmp_path / f"{layouts}", *sizes, runs=runs)
        assert [(row["stages"], row["replicas"]) for row in summaries] == list(layouts)
        for row in summaries:
            digests[row["replicas"]].add(row["digest"])
            assert row["samples"] == 2 * 50
    assert [len(digests[replicas]) for replicas in (1, 2)] == [1, 1]


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("net", ["unet", "language_model", "complex_skips"])
def test_a_graph_trains_the_same_bits_on_three_stages(net: str, comm: Comm, tmp_path: Path) -> None:
    """Law 1 with skips, tied weights and complex numbers; the runs train side by side."""
    runs = [graph_run(net, mesh__stages=stages, epochs=1) for stages in (1, 3)]
    one, three = trained(comm, tmp_path, 1, 3, runs=runs)
    assert (one["stages"], three["stages"]) == (1, 3)
    assert one["digest"] == three["digest"]


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
def test_replicas_train_the_same_model(objective: str, comm: Comm, tmp_path: Path) -> None:
    """Law 1 over replicas, from the same run file, in float64."""
    run = run_of(2, objective, dtype="float64")
    outs = [Path(comm.allgather_object(str(tmp_path / f"{ranks}"))[0]) for ranks in (2, 4)]
    for ranks, out in zip((2, 4), outs, strict=True):
        trained(comm, out, ranks, runs=[run])
    close(*(out / "0" for out in outs))


@pytest.mark.mpi(min_size=4)
def test_resumed_is_uninterrupted(comm: Comm, tmp_path: Path) -> None:
    """Law 5 on the same layout, 2 stages x 2 replicas."""
    for epochs in (1, 3):
        (parts,) = trained(comm, tmp_path / "parts", 4, runs=[run_of(2, epochs=epochs)])
    (whole,) = trained(comm, tmp_path / "whole", 4, runs=[run_of(2, epochs=3)])
    for key in ("digest", "test_accuracy", "test_loss", "train_loss", "samples"):
        assert parts[key] == whole[key], key
    assert (parts["attempts"], whole["attempts"]) == (2, 1)
