"""The digits, and what every objective makes of them with its default fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.config.parse import parse_run
from dtrain.data import load_data
from dtrain.objectives import OBJECTIVES
from dtrain.planning.block_factory import make_block
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES
from dtrain.schedules.asynchronous import AsyncSchedule
from dtrain.train import train
from tests.outcome import model

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

LEAST = {"drtp": 0.3}
"""Test accuracy that must be exceeded, where it is not one half."""

SIGNALS = {"f3": ("delayed_error", -1)}
"""What says how well an inner block does, and where to it goes, where it is not its loss down."""

TOLD = ("dfa", "pepita")
"""What has no signal of its own in an inner block: it is told the last one's error."""

LONG = {"forward-forward": 20}
"""Epochs, where it is not enough to go over the digits eight times."""

STILL = ("cafo",)
"""Whose inner layers are random and stay so: the heads are solved."""


def test_digits() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    digits = load_data("digits", {}, Path())
    assert (digits.train.size, digits.test.size) == (1437, 360)
    assert digits.train.shape == digits.test.shape == (1, 8, 8)
    x, y = digits.train.inputs(range(1437)), digits.train.targets(range(1437))
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 1e-5
    assert abs(float(x.std()) - 1) < 1e-3
    share = torch.bincount(y) / 1437 - torch.bincount(digits.test.targets(range(360))) / 360
    assert float(share.abs().max()) < 2 / 360
    again = load_data("digits", {}, Path()).train.targets(range(1437))
    assert torch.equal(y, again)
    assert not torch.equal(y, y.sort().values)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_digits(schedule: str, tmp_path: Path) -> None:
    """Three stages, by backpropagation where the schedule runs it."""
    kind = SCHEDULES[schedule]
    routes = OBJECTIVES["backprop"]().routes(3, "train")
    global_ = kind().supports_all(routes)
    table: dict[str, Any] = {
        "epochs": 20,
        "batch-size": 128,
        "micro-batches": 1 if issubclass(kind, AsyncSchedule) else 4,
        "threads": 1,
        "data": {"name": "digits"},
        "model": {"name": "mlp", "widths": [61, 47, 53]},
        "mesh": {"stages": 3},
        "objective": {"name": "backprop" if global_ else "mono-forward"},
        "schedule": {"name": schedule},
        "optimizer": {"name": "adam", "lr": 1e-3},
        "evaluate": {"every": 20},
    }
    assert global_ == (schedule != "stream")
    run = parse_run(table, tmp_path / "digits.toml")
    told = ranks(3, lambda comm: train(run, comm, tmp_path / "out"))[0]
    assert told["test_accuracy"] > 0.8


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_digits(objective: str, tmp_path: Path) -> None:
    """Three blocks on two stages: all blocks move, and their own signals improve.

    In at most 20 epochs, after which all are recorded in `docs/objectives.md`.
    """
    epochs = LONG.get(objective, 8)
    table: dict[str, Any] = {
        "epochs": epochs,
        "batch-size": 32,
        "threads": 1,
        "data": {"name": "digits"},
        "model": {"name": "mlp", "widths": [61, 47, 53]},
        "mesh": {"stages": 2},
        "partition": {"blocks": 3},
        "objective": {"name": objective},
        "optimizer": {"name": "adam", "lr": 1e-3},
        "evaluate": {"every": epochs},
    }
    run = parse_run(table, tmp_path / "digits.toml")
    told = ranks(2, lambda comm: train(run, comm, tmp_path / "out"))[0]
    assert told["test_accuracy"] > LEAST.get(objective, 0.5)
    layout, after = make_plan(run, 2).layout, model(tmp_path / "out")
    for index in range(3):
        block = make_block(run, layout, index, torch.device("cpu"))
        for name, before in block.parameters.items():
            if objective not in STILL and before.requires_grad:
                assert not torch.equal(after[name], before.detach()), name
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [each for each in map(json.loads, lines) if each["kind"] == "train"]
    if objective == "dni":  # it guesses what is itself on the move; a new one knows nothing: 0
        assert min(rows[-1]["synthetic_cosine"][:2]) > 0.2
        return
    key, way = SIGNALS.get(objective, ("loss", -1))
    for index in [2] if objective in (*TOLD, "backprop") else [0, 1]:
        assert way * rows[-1][key][index] > way * rows[0][key][index], index
