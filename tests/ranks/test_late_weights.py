"""Delayed updates over whole runs: equal to the simulator, and the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.config.run import RunConfig
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError, DtrainError
from dtrain.planning.block_factory import make_block
from dtrain.planning.plan import make_plan
from tests import stale, tiny
from tests.harness import FULL, some, train_in_threads
from tests.outcome import close, model
from tests.refusals import refuses
from tests.stale import DelayedTraining

BLOCKS = 4
PIPELINED = [2 * (BLOCKS - 1 - b) for b in range(BLOCKS)]
PIPEDREAM = [BLOCKS - 1 - b for b in range(BLOCKS)]
"""Delays of the blocks, in updates."""
PIPELINED_GAPS, PIPEDREAM_GAPS = [0, 1, 2, 3], [0, 0, 1, 1]
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 0.01}

CASES: dict[str, tuple[dict[str, Any], DelayedTraining]] = {
    "plain": ({}, DelayedTraining(PIPELINED)),
    "stash": ({"weights": "stash"}, DelayedTraining(PIPELINED, stash=True)),
    "velocity": ({"prediction": "velocity"}, DelayedTraining(PIPELINED, prediction="velocity")),
    "twice as far": (
        {"prediction": "velocity", "horizon": 2.0},
        DelayedTraining(PIPELINED, prediction="velocity", horizon=2.0),
    ),
    "difference": (
        {"prediction": "difference"},
        DelayedTraining(PIPELINED, prediction="difference"),
    ),
    "coasting": ({"prediction": "coasting"}, DelayedTraining(PIPELINED, prediction="coasting")),
    "spectrain": (
        {"prediction": "spectrain"},
        DelayedTraining(PIPELINED, PIPELINED_GAPS, prediction="spectrain"),
    ),
    "spike": ({"compensation": "spike"}, DelayedTraining(PIPELINED, spike_compensation=True)),
    "both": (
        {"prediction": "velocity", "compensation": "spike"},
        DelayedTraining(PIPELINED, prediction="velocity", spike_compensation=True),
    ),
    "difference and spike": (
        {"prediction": "difference", "compensation": "spike"},
        DelayedTraining(PIPELINED, prediction="difference", spike_compensation=True),
    ),
    "stashed prediction": (
        {"prediction": "velocity", "weights": "stash"},
        DelayedTraining(PIPELINED, prediction="velocity", stash=True),
    ),
    "all": (
        {"prediction": "coasting", "weights": "stash", "compensation": "spike"},
        DelayedTraining(PIPELINED, prediction="coasting", stash=True, spike_compensation=True),
    ),
    "adam": ({}, DelayedTraining(PIPELINED, adam=True, lr=0.01)),
    "adam predicted": (
        {"prediction": "optimizer"},
        DelayedTraining(PIPELINED, prediction="optimizer", adam=True, lr=0.01),
    ),
    "adam by difference": (
        {"prediction": "difference"},
        DelayedTraining(PIPELINED, prediction="difference", adam=True, lr=0.01),
    ),
    "pipedream": ({"name": "pipedream"}, DelayedTraining(PIPEDREAM, stash=True)),
    "pipedream without stash": (
        {"name": "pipedream", "weights": "current"},
        DelayedTraining(PIPEDREAM),
    ),
    "vertical sync": (
        {"name": "pipedream", "vertical-sync": True},
        DelayedTraining([3] * BLOCKS, stash=True, lag=3),
    ),
    "pipedream, spectrain": (
        {"name": "pipedream", "weights": "current", "prediction": "spectrain"},
        DelayedTraining(PIPEDREAM, PIPEDREAM_GAPS, prediction="spectrain"),
    ),
    "pipedream, spike": (
        {"name": "pipedream", "compensation": "spike"},
        DelayedTraining(PIPEDREAM, stash=True, spike_compensation=True),
    ),
    "replay": ({"name": "features-replay"}, DelayedTraining(PIPEDREAM, replay=True)),
    "2bw": ({"name": "pipedream-2bw"}, DelayedTraining([1] * BLOCKS, stash=True, lag=1)),
}


def convolutional() -> nn.Sequential:
    """Return five layers, three of them convolutions with GroupNorm."""
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


def make_run(case: str, net: str, stages: int, **changes: Any) -> Any:
    """Return the run of a case: four blocks, the last of two layers."""
    fields, settings = CASES[case]
    name = fields.get("name", "pipelined")
    micros = {"batch_size": 15, "micro_batches": 3} if name == "pipedream-2bw" else {}
    return tiny.run(
        **{
            "model__name": f"tests.ranks.test_late_weights:{NETS[net].__name__}",
            "model__widths": None,
            "partition": {"cuts": [1, 2, 3]},
            "objective__name": "backprop",
            "schedule": {"name": name} | fields,
            "optimizer": dict(ADAM if settings.adam else SGD),
            "mesh__stages": stages,
            "micro_batches": 1,
            "batch_size": 5,
            "epochs": 1,
            **micros,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("case", "net"),
    [*((case, "mlp") for case in CASES), *((case, "cnn") for case in some([*CASES], 0))],
)
def test_runs_equal_the_simulator(case: str, net: str, tmp_path: Path) -> None:
    """The perceptron on four ranks, convolutions on two: the simulator's weights."""
    counts = (1, 2, 4) if FULL else (4,) if net == "mlp" else (2,)
    digests = {
        train_in_threads(make_run(case, net, n), tmp_path / str(n), n)["digest"] for n in counts
    }
    assert len(digests) == 1
    layers = NETS[net]().double()
    layers.load_state_dict(initial_parameters(make_run(case, net, 1)))
    blocks = [leaf_modules(part) for part in (layers[0], layers[1], layers[2], layers[3:])]
    run = make_run(case, net, 1)
    samples = load_data(run.dataset.name, {}, run.folder).train
    order = epoch_order(50, 3, 0, "full")
    size, micros = run.settings.batch_size, run.settings.micro_batches
    updates = [
        [
            (samples.inputs(rows), samples.targets(rows))
            for rows in np.array_split(order[start : start + size], micros)
        ]
        for start in range(0, 50, size)
    ]
    expected = stale.train(blocks, updates, CASES[case][1])
    weights = model(tmp_path / str(counts[0]))
    names = [name for name, _ in layers.named_parameters()]
    simulated = (weight for block in expected for weight in block)
    for name, weight in zip(names, simulated, strict=True):
        torch.testing.assert_close(weights[name], weight, rtol=1e-11, atol=1e-13)


def initial_parameters(run: RunConfig) -> dict[str, torch.Tensor]:
    """Return the parameters of the model as the seed draws them."""
    layout = make_plan(run, 1).layout
    blocks = [make_block(run, layout, b, torch.device("cpu")) for b in range(BLOCKS)]
    return {name: p.detach() for block in blocks for name, p in block.parameters.items()}


def leaf_modules(module: nn.Module) -> list[nn.Module]:
    """Return the modules without children, in order."""
    return [child for child in module.modules() if not list(child.children())]


def test_both_linear_predictions_agree_but_not_with_spike_compensation(tmp_path: Path) -> None:
    """For plain SGD with momentum, w - w of one update before is - lr v."""
    for case in ("velocity", "difference", "both", "difference and spike"):
        train_in_threads(make_run(case, "mlp", 2), tmp_path / case, 2)
    close(tmp_path / "velocity", tmp_path / "difference", rtol=1e-10)
    with pytest.raises(AssertionError):
        close(tmp_path / "both", tmp_path / "difference and spike", rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"horizon": 2.0}, "schedule.horizon-without-prediction"),
        ({"horizon": -1.0, "prediction": "velocity"}, "schedule.horizon-out-of-range"),
        ({"prediction": "spectrain", "weights": "stash"}, "schedule.spectrain-with-stash"),
        (
            {"name": "pipedream", "vertical-sync": True, "weights": "current"},
            "schedule.vertical-sync-with-other-weights",
        ),
        ({"name": "features-replay", "weights": "stash"}, "schedule.replay-with-stash"),
    ],
)
def test_contradicting_fields_are_refused(fields: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        tiny.run(schedule={"name": "pipelined"} | fields, optimizer=SGD)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(DtrainError):
        tiny.run(schedule={"name": "pipelined", "prediction": "nothing"}, optimizer=SGD)


@pytest.mark.parametrize(
    ("fields", "optimizer"),
    [
        ({"prediction": "velocity"}, ADAM),
        ({"compensation": "spike"}, ADAM),
        ({"prediction": "coasting"}, {"name": "sgd", "lr": 0.1}),
        ({"prediction": "optimizer"}, {"name": "rmsprop", "lr": 0.1}),
        ({"compensation": "spike"}, SGD | {"nesterov": True}),
    ],
)
def test_optimizers_without_a_formula_are_refused(
    fields: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    tiny.run(schedule={"name": "pipelined"}, optimizer=optimizer)
    with pytest.raises(ConfigError):
        tiny.run(schedule={"name": "pipelined"} | fields, optimizer=optimizer)


def test_pipedream_2bw_needs_enough_micro_batches(tmp_path: Path) -> None:
    with refuses(ConfigError, "schedule.too-few-micro-batches"):
        train_in_threads(make_run("2bw", "mlp", 1, micro_batches=2), tmp_path, 1)


def test_one_block_trains_as_sgd_does(tmp_path: Path) -> None:
    """Without a delay every mitigation is the identity, bit for bit."""
    one_block: dict[str, Any] = {"partition": {"blocks": 1}, "mesh__stages": 1}
    cases = ["plain", "velocity", "coasting", "spike", "both", "all", "pipedream", "vertical sync"]
    cases.append("replay")
    digests = {
        train_in_threads(make_run(case, "mlp", 1, **one_block), tmp_path / case, 1)["digest"]
        for case in cases
    }
    flush = make_run("plain", "mlp", 1, **one_block, schedule={"name": "1f1b"})
    assert digests == {train_in_threads(flush, tmp_path / "flush", 1)["digest"]}
