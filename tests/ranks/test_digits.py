"""The digits: their split, and runs in which every objective, schedule and sync trains them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.config.parse import parse_run
from dtrain.config.run import RunConfig
from dtrain.data import load_data
from dtrain.data.formats.digits_set import stratified_split
from dtrain.objectives import OBJECTIVES
from dtrain.planning.block_factory import make_block
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES
from dtrain.syncs import SYNCS
from tests.harness import train_in_threads
from tests.outcome import model

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
model_selection = pytest.importorskip("sklearn.model_selection")

RUNS = [
    ("backprop", "petra", "never"),
    ("cafo", "fill-drain", "every-step"),
    ("ccl", "fold", "diloco"),
    ("dfa", "pipedream", "powersgd"),
    ("deep-supervision", "pipedream-2bw", "warmup"),
    ("diffusion-blocks", "stream", "every-step"),
    ("dni", "fill-drain", "every-step"),
    ("drtp", "stream", "every-step"),
    ("dual-propagation", "features-replay", "every-step"),
    ("f3", "drained", "every-step"),
    ("forward-forward", "fill-drain", "every-step"),
    ("forward-gnn", "stream-replay", "every-step"),
    ("forward-gradient", "stream", "every-step"),
    ("infopro", "drained", "ab"),
    ("layer-collaboration", "1f1b", "daso"),
    ("lls", "stream", "int8"),
    ("lls-m", "pipelined", "demo"),
    ("lls-mxm", "stream", "terngrad"),
    ("local-head", "stream", "oialr"),
    ("man", "fill-drain", "local-sgd"),
    ("mono-forward", "stream", "daso"),
    ("noprop", "stream", "every-step"),
    ("pepita", "drained", "every-step"),
    ("pfa", "1f1b", "every-step"),
    ("scalable-ff", "interleaved", "only-large"),
    ("tpsgd", "pipelined", "qsr"),
    ("ulr", "stream", "every-step"),
]
"""Objective, schedule and sync of each run, all with their default fields."""

EPOCHS = 8

FEWER_EPOCHS = {"forward-gradient": 4, "pfa": 4, "ulr": 4}
"""Epochs of objectives that take longer."""

ACCURACIES = {
    "drtp": 0.5,
    "forward-forward": 0.6,
    "forward-gradient": 0.6,
    "infopro": 0.7,
    "pfa": 0.7,
    "ulr": 0.6,
}
"""Test accuracies to exceed after so few epochs, where other than 0.8; chance is 0.1."""

BATCH_SIZES = {"drtp": 32, "forward-forward": 32}
"""Batch sizes other than 64: these two need more updates."""

LAST_BLOCK_ONLY = ("backprop", "dfa", "dual-propagation", "pepita", "pfa")
"""Objectives without a loss in inner blocks."""

FIXED_LAYERS = ("cafo",)
"""Objectives whose inner layers stay at their random weights: only heads are solved."""


def test_digits() -> None:
    digits = load_data("digits", {}, Path())
    assert (digits.train.size, digits.test.size) == (1437, 360)
    assert digits.train.shape == digits.test.shape == (1, 8, 8)
    x, y = digits.train.inputs(range(1437)), digits.train.targets(range(1437))
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 1e-5
    assert abs(float(x.std()) - 1) < 1e-3
    test_y = digits.test.targets(range(360))
    difference = torch.bincount(y) / 1437 - torch.bincount(test_y) / 360
    assert float(difference.abs().max()) < 2 / 360
    again = load_data("digits", {}, Path()).train.targets(range(1437))
    assert torch.equal(y, again)
    assert not torch.equal(y, y.sort().values)


def test_digits_are_those_of_scikit_learn() -> None:
    x, y = datasets.load_digits(return_X_y=True)
    x = x.astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = model_selection.train_test_split(
        x, y, train_size=1437, test_size=360, stratify=y, random_state=0
    )
    splits = load_data("digits", {}, Path(), normalise=False)
    for split, inputs, labels in ((splits.train, train_x, train_y), (splits.test, test_x, test_y)):
        indices = np.arange(split.size)
        assert np.array_equal(split.inputs(indices).numpy(), inputs)
        assert np.array_equal(split.targets(indices).numpy(), labels)


@pytest.mark.parametrize("seed", range(20))
def test_a_stratified_split_is_that_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    classes = int(random.integers(2, 8))
    labels = random.permutation([*range(classes)] * 3 + [*random.integers(0, classes, 50)])
    train_size = int(random.integers(classes, len(labels) // 2))
    test_size = int(random.integers(classes, len(labels) - train_size))
    ours = stratified_split(labels, train_size, test_size)
    theirs = model_selection.train_test_split(
        np.arange(len(labels)),
        train_size=train_size,
        test_size=test_size,
        stratify=labels,
        random_state=0,
    )
    assert [part.tolist() for part in ours] == [part.tolist() for part in theirs]


def test_every_objective_schedule_and_sync_is_in_a_run() -> None:
    objectives, schedules, syncs = map(set, zip(*RUNS, strict=True))
    assert (objectives, schedules, syncs) == (set(OBJECTIVES), set(SCHEDULES), set(SYNCS))


@pytest.mark.parametrize(("objective", "schedule", "sync"), RUNS, ids=map("-".join, RUNS))
def test_trains_digits(objective: str, schedule: str, sync: str, tmp_path: Path) -> None:
    """Three blocks on two stages and two replicas, one per node: eight epochs of Adam.

    The run exceeds its accuracy, all trainable weights move, and each block's signal improves.
    """
    run = digits_run(objective, schedule, sync, tmp_path)
    out, hosts = tmp_path / "out", ["a", "a", "b", "b"]
    summary = train_in_threads(run, out, 2, 2, hosts=hosts)
    assert summary["test_accuracy"] > ACCURACIES.get(objective, 0.8)
    if objective not in FIXED_LAYERS:
        check_all_weights_move(run, out)
    check_signals_improve(objective, out)


def digits_run(objective: str, schedule: str, sync: str, folder: Path) -> RunConfig:
    epochs = FEWER_EPOCHS.get(objective, EPOCHS)
    table: dict[str, Any] = {
        "epochs": epochs,
        "batch-size": BATCH_SIZES.get(objective, 64),
        "micro-batches": 1 if SCHEDULES[schedule].delays_count_micro_batches else 2,
        "threads": 1,
        "data": {"name": "digits"},
        "model": {"name": "mlp", "widths": [61, 47, 53]},
        "mesh": {"stages": 2},
        "partition": {"blocks": 3},
        "objective": {"name": objective},
        "schedule": {"name": schedule},
        "sync": {"name": sync},
        "optimizer": {"name": "adam", "lr": 3e-3},
        "evaluate": {"every": epochs},
    }
    return parse_run(table, folder / "digits.toml")


def check_all_weights_move(run: RunConfig, out: Path) -> None:
    """Assert that every trainable parameter differs from its initial value."""
    layout, trained = make_plan(run, 4).layout, model(out)
    for index in range(3):
        block = make_block(run, layout, index, torch.device("cpu"))
        for name, parameter in block.parameters.items():
            if parameter.requires_grad:
                assert not torch.equal(trained[name], parameter.detach()), name


def check_signals_improve(objective: str, out: Path) -> None:
    """Assert that each block's signal, in most objectives its loss, is lower in the last epoch."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    epochs = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    if objective == "dni":
        # The target of a synthesiser changes as it learns, so its loss may rise. A new one predicts
        # gradients of zero, whose cosine is 0.
        assert min(epochs[-1]["synthetic_cosine"][:2]) > 0.2
        return
    key = "delayed_error" if objective == "f3" else "loss"
    for block in [2] if objective in LAST_BLOCK_ONLY else [0, 1]:
        assert epochs[-1][key][block] < epochs[0][key][block], block
