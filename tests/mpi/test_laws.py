"""The laws of training over MPI: groups of one world train side by side, one start for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.comm.comm import Comm
from dtrain.config import Run, parse
from dtrain.train import train
from tests.outcome import close, summary

CELLS = [
    ("mono-forward", "stream", "float32"),
    ("mono-forward", "stream", "float64"),
    ("backprop", "fill-drain", "float32"),
    ("backprop", "fill-drain", "float64"),
    ("backprop", "1f1b", "float32"),
    ("backprop", "1f1b", "float64"),
]


def digits(stages: int, objective: str = "mono-forward", **top: Any) -> Run:
    """Return a run on digits: batches of 128 in three micro-batches, the last one of 29."""
    top = {"epochs": 1, "batch-size": 128, "micro-batches": 3, "threads": 1} | top
    schedule = top.pop("schedule", None)
    table = {
        **top,
        "data": {"name": "digits"},
        "model": {"name": "mlp", "widths": [61, 47, 53]},
        "mesh": {"stages": stages},
        "partition": {"blocks": 3},
        "objective": {"name": objective},
        "schedule": {"name": schedule} if schedule else {},
        "optimizer": {"name": "adam", "lr": 1e-3},
    }
    return parse(table, Path(__file__))


def trained(comm: Comm, ranks: int, run: Run, out: Path) -> dict[str, Any]:
    """Train on the first `ranks` of `comm`, into rank 0's `out`; return the summary on all."""
    out = Path(comm.exchange(str(out))[0])
    part = comm.split(int(comm.rank >= ranks), comm.rank)
    if comm.rank < ranks:
        train(run, part, out)
    comm.exchange("trained")
    return summary(out)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("objective", "schedule", "dtype"), CELLS)
def test_one_two_and_three_ranks_train_the_same_bits(
    objective: str, schedule: str, dtype: str, comm: Comm, tmp_path: Path
) -> None:
    """Law 1 over stages; two ranks hold four layers unevenly."""
    told = {"objective": objective, "schedule": schedule, "dtype": dtype}
    found = [trained(comm, n, digits(n, **told), tmp_path / f"{objective}-{n}") for n in (1, 2, 3)]
    assert [each["stages"] for each in found] == [1, 2, 3]
    assert len({each["digest"] for each in found}) == 1
    assert {each["samples"] for each in found} == {1437}


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("objective", ["mono-forward", "backprop"])
def test_replicas_train_the_same_model(objective: str, comm: Comm, tmp_path: Path) -> None:
    """Law 1 over replicas, from the same run file, in float64."""
    run = digits(2, objective, dtype="float64")
    outs = [Path(comm.exchange(str(tmp_path / f"{ranks}"))[0]) for ranks in (2, 4)]
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
