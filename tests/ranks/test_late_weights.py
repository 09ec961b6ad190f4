"""Late updates over whole runs: against the simulator, and the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.errors import DtrainError
from dtrain.train import train
from tests import stale, tiny
from tests.outcome import close, model
from tests.stale import Late

BLOCKS = 4
LINE = [2 * (BLOCKS - 1 - b) for b in range(BLOCKS)]
HALF = [BLOCKS - 1 - b for b in range(BLOCKS)]
GAPS, HALF_GAPS = [0, 1, 2, 3], [0, 0, 1, 1]
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 0.01}

CASES: dict[str, tuple[dict[str, Any], Late]] = {
    "plain": ({}, Late(LINE)),
    "stash": ({"weights": "stash"}, Late(LINE, stash=True)),
    "velocity": ({"prediction": "velocity"}, Late(LINE, prediction="velocity")),
    "twice as far": (
        {"prediction": "velocity", "horizon": 2.0},
        Late(LINE, prediction="velocity", horizon=2.0),
    ),
    "difference": ({"prediction": "difference"}, Late(LINE, prediction="difference")),
    "coasting": ({"prediction": "coasting"}, Late(LINE, prediction="coasting")),
    "spectrain": ({"prediction": "spectrain"}, Late(LINE, GAPS, prediction="spectrain")),
    "spike": ({"compensation": "spike"}, Late(LINE, spikes=True)),
    "both": (
        {"prediction": "velocity", "compensation": "spike"},
        Late(LINE, prediction="velocity", spikes=True),
    ),
    "difference and spike": (
        {"prediction": "difference", "compensation": "spike"},
        Late(LINE, prediction="difference", spikes=True),
    ),
    "stashed prediction": (
        {"prediction": "velocity", "weights": "stash"},
        Late(LINE, prediction="velocity", stash=True),
    ),
    "all": (
        {"prediction": "coasting", "weights": "stash", "compensation": "spike"},
        Late(LINE, prediction="coasting", stash=True, spikes=True),
    ),
    "adam": ({}, Late(LINE, adam=True, lr=0.01)),
    "adam foretold": (
        {"prediction": "optimizer"},
        Late(LINE, prediction="optimizer", adam=True, lr=0.01),
    ),
    "adam by difference": (
        {"prediction": "difference"},
        Late(LINE, prediction="difference", adam=True, lr=0.01),
    ),
    "pipedream": ({"name": "pipedream"}, Late(HALF, stash=True)),
    "pipedream without stash": ({"name": "pipedream", "weights": "current"}, Late(HALF)),
    "vertical sync": (
        {"name": "pipedream", "vertical-sync": True},
        Late([3] * BLOCKS, stash=True, lag=3),
    ),
    "pipedream, spectrain": (
        {"name": "pipedream", "weights": "current", "prediction": "spectrain"},
        Late(HALF, HALF_GAPS, prediction="spectrain"),
    ),
    "pipedream, spike": (
        {"name": "pipedream", "compensation": "spike"},
        Late(HALF, stash=True, spikes=True),
    ),
    "2bw": ({"name": "pipedream-2bw"}, Late([1] * BLOCKS, stash=True, lag=1)),
}


def convolutional() -> nn.Sequential:
    """Return five layers, convolutions with GroupNorm among them."""
    return nn.Sequential(
        nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU()),
        nn.Sequential(nn.Conv1d(6, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU()),
        nn.Sequential(nn.Conv1d(8, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(30, 7), nn.ReLU()),
        nn.Linear(7, 3),
    )


def perceptron() -> nn.Sequential:
    """Return five layers of a perceptron."""
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(10, 13), nn.ReLU()),
        nn.Sequential(nn.Linear(13, 11), nn.ReLU()),
        nn.Sequential(nn.Linear(11, 7), nn.ReLU()),
        nn.Sequential(nn.Linear(7, 6), nn.ReLU()),
        nn.Linear(6, 3),
    )


NETS = {"mlp": perceptron, "cnn": convolutional}


def told(case: str, net: str, stages: int, **more: Any) -> Any:
    """Return the run of a case: four blocks, the last of two layers."""
    fields, late = CASES[case]
    name = fields.get("name", "pipelined")
    micros = {"batch_size": 15, "micro_batches": 3} if name == "pipedream-2bw" else {}
    return tiny.run(
        **{
            "model__name": f"tests.ranks.test_late_weights:{NETS[net].__name__}",
            "model__widths": None,
            "partition": {"cuts": [1, 2, 3]},
            "objective__name": "backprop",
            "schedule": {"name": name} | fields,
            "optimizer": dict(ADAM if late.adam else SGD),
            "mesh__stages": stages,
            "micro_batches": 1,
            "batch_size": 5,
            "epochs": 1,
            **micros,
            **more,
        }
    )


def trained(run: Any, out: Path, stages: int) -> dict[str, Any]:
    """Train on `stages` ranks; return the summary."""
    return ranks(stages, lambda comm: train(run, comm, out), seed=stages)[0]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("case", CASES)
def test_runs_are_those_of_the_simulator(case: str, net: str, tmp_path: Path) -> None:
    """One rank and four, for the perceptron two as well: one digest, the simulator's weights."""
    counts = (1, 2, 4) if net == "mlp" else (1, 4)
    found = [trained(told(case, net, n), tmp_path / str(n), n)["digest"] for n in counts]
    assert len(set(found)) == 1
    still = told(case, net, 1, epochs=None, updates=1, optimizer__lr=0.0)
    trained(still, tmp_path / "start", 1)
    layers = NETS[net]().double()
    layers.load_state_dict(model(tmp_path / "start"))
    blocks = [flat(part) for part in (layers[0], layers[1], layers[2], layers[3:])]
    run = told(case, net, 1)
    samples = load_data(run.dataset.name, {}, run.folder).train
    rows = epoch_order(50, 3, 0, "full")
    size, micros = run.settings.batch_size, run.settings.micro_batches
    updates = [
        [(samples.inputs(part), samples.targets(part)) for part in parts(batch, micros)]
        for batch in (rows[i : i + size] for i in range(0, 50, size))
    ]
    ends = stale.train(blocks, updates, CASES[case][1])
    ours, names = model(tmp_path / "1"), [name for name, _ in layers.named_parameters()]
    for name, wanted in zip(names, (each for block in ends for each in block), strict=True):
        torch.testing.assert_close(ours[name], wanted, rtol=1e-11, atol=1e-13)


def parts(batch: Any, count: int) -> list[Any]:
    """Return the micro-batches of a batch."""
    return np.array_split(batch, count)


def flat(module: nn.Module) -> list[nn.Module]:
    """Return the modules without children, in order."""
    return [each for each in module.modules() if not list(each.children())]


def test_both_forms_of_the_velocity_agree_but_not_with_spikes(tmp_path: Path) -> None:
    """For plain SGD with momentum w - w of one update before is - lr v."""
    for case in ("velocity", "difference", "both", "difference and spike"):
        trained(told(case, "mlp", 2), tmp_path / case, 2)
    close(tmp_path / "velocity", tmp_path / "difference", rtol=1e-10)
    with pytest.raises(AssertionError):
        close(tmp_path / "both", tmp_path / "difference and spike", rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 2.0}, "horizon without a prediction"),
        ({"horizon": -1.0, "prediction": "velocity"}, "horizon = -1.0 is no number of delays"),
        ({"prediction": "spectrain", "weights": "stash"}, "choose one of them"),
        ({"name": "pipedream", "vertical-sync": True, "weights": "current"}, "vertical-sync"),
        ({"prediction": "nothing"}, "prediction"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DtrainError, match=message):
        tiny.run(schedule={"name": "pipelined"} | changes, optimizer=SGD).make_schedule()


@pytest.mark.parametrize(
    ("changes", "optimizer", "message"),
    [
        ({"prediction": "velocity"}, ADAM, "goes by the velocity of sgd"),
        ({"compensation": "spike"}, ADAM, "take sgd"),
        ({"prediction": "coasting"}, {"name": "sgd", "lr": 0.1}, "momentum is 0"),
        ({"prediction": "optimizer"}, {"name": "rmsprop", "lr": 0.1}, "not of 'rmsprop'"),
        ({"compensation": "spike"}, SGD | {"nesterov": True}, "no formula for .* nesterov"),
    ],
)
def test_what_the_optimizer_has_no_rule_for_is_refused(
    changes: dict[str, Any], optimizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(DtrainError, match=message):
        tiny.run(schedule={"name": "pipelined"} | changes, optimizer=optimizer)


def test_two_buffers_need_enough_micro_batches(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match="needs 3 micro-batches or more"):
        trained(told("2bw", "mlp", 1, micro_batches=2), tmp_path, 1)


def test_no_delay_is_sgd(tmp_path: Path) -> None:
    """One block: every mitigation is the identity, bit for bit."""
    one: dict[str, Any] = {"partition": {"blocks": 1}, "mesh__stages": 1}
    cases = ["plain", "velocity", "coasting", "spike", "both", "all", "pipedream", "vertical sync"]
    found = {trained(told(c, "mlp", 1, **one), tmp_path / c, 1)["digest"] for c in cases}
    flush = told("plain", "mlp", 1, **one, schedule={"name": "1f1b"})
    assert found == {trained(flush, tmp_path / "flush", 1)["digest"]}
