"""Objectives with unusual needs, run like any other, keep the laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.cafo import Cafo
from dtrain.objectives.ccl import Ccl
from dtrain.objectives.noprop import Noprop
from dtrain.objectives.pepita import Pepita
from dtrain.schedules import SCHEDULES
from dtrain.schedules.drained import Drained
from dtrain.training import train
from tests import tiny
from tests.outcome import close, model
from tests.refusals import refuses

WITNESSES = {"pepita": Pepita, "cafo": Cafo, "noprop": Noprop, "ccl": Ccl}


@pytest.fixture(autouse=True)
def register_witnesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the witnesses names in run files."""
    for name, kind in WITNESSES.items():
        monkeypatch.setitem(OBJECTIVES, name, kind)
    monkeypatch.setitem(SCHEDULES, "drained", Drained)


def train_tiny(out: Path, stages: int = 1, replicas: int = 1, **changes: Any) -> dict[str, Any]:
    """Train the tiny run in four blocks on `stages` x `replicas` threads."""
    run: RunConfig = tiny.run(**{"partition__blocks": 4, "mesh__stages": stages, **changes})

    def work(comm: Comm) -> dict[str, Any]:
        return train(run, comm, out)

    return run_ranks(stages * replicas, work, seed=stages)[0]


@pytest.mark.parametrize("objective", WITNESSES)
@pytest.mark.parametrize("schedule", [None, "drained"])
def test_any_number_of_ranks_trains_the_same_bits(
    objective: str, schedule: str | None, tmp_path: Path
) -> None:
    changes = {"schedule__name": schedule} if schedule else {}
    summaries = [
        train_tiny(tmp_path / str(n), n, objective__name=objective, **changes) for n in (1, 2, 4)
    ]
    assert len({summary["digest"] for summary in summaries}) == 1
    assert summaries[0]["test_loss"] == summaries[1]["test_loss"]


@pytest.mark.parametrize("objective", WITNESSES)
def test_replicas_and_micro_batches_train_the_same_model(objective: str, tmp_path: Path) -> None:
    train_tiny(tmp_path / "one", 2, objective__name=objective, micro_batches=1)
    train_tiny(tmp_path / "two", 2, 2, objective__name=objective)
    close(tmp_path / "one", tmp_path / "two", 1e-9 if objective == "cafo" else 1e-12)


@pytest.mark.parametrize("objective", WITNESSES)
def test_it_learns(objective: str, tmp_path: Path) -> None:
    """The classes are easy: every objective must do far better than one third."""
    changes: dict[str, Any] = {"epochs": 10, "optimizer__lr": 0.05}
    if objective == "pepita":  # its paper: the error fades with depth, use two or three layers
        changes |= {"model": {"name": "mlp", "widths": [20]}, "partition__blocks": 2}
    summary = train_tiny(tmp_path, objective__name=objective, **changes)
    assert summary["test_accuracy_vote"] > 0.6


def random_features(out: Path, layers: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the features of the first random layers of a run, and the labels."""
    run = tiny.run()
    samples = load_data(run.dataset.name, {}, run.folder).train
    x = samples.inputs(range(50)).double()
    weights, features = model(out), []
    for name in ("fc1", "fc2", "fc3", "fc4")[:layers]:
        x = torch.relu(x.flatten(1) @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
        features.append(x)
    return features, samples.targets(range(50))


def test_closed_forms_leave_no_residual_along_the_features(tmp_path: Path) -> None:
    """The normal equations of CaFo: X^T (X W - Y) = 0, over all samples of both replicas."""
    train_tiny(tmp_path, 2, 2, objective__name="cafo", epochs=1)
    features, targets = random_features(tmp_path, 4)
    heads = [f"heads.{block}.linear" for block in range(3)] + ["head"]
    weights = model(tmp_path)
    for x, head in zip(features, heads, strict=True):
        outputs = x @ weights[f"{head}.weight"].T + weights[f"{head}.bias"]
        residual = outputs - one_hot(targets, 3)
        assert (x.T @ residual).abs().max() < 1e-9
        assert residual.sum(0).abs().max() < 1e-9


def test_pepita_follows_the_rule_of_its_paper(tmp_path: Path) -> None:
    """One update of PEPITA against its formula, written out layer by layer."""
    train_tiny(
        tmp_path, 2, objective__name="pepita", optimizer={"name": "sgd", "lr": 0.1}, epochs=None,
        updates=1, micro_batches=2, partition__blocks=5,
    )  # fmt: skip
    run = tiny.run()
    samples = load_data(run.dataset.name, {}, run.folder).train
    layer_stack = load_model("mlp", run.model.fields, run.folder, (2, 5), 3)
    layers = [*layer_stack.build(range(5), 3, torch.float64).items()]
    batch = epoch_order(50, 3, 0, "full")[:16]
    x, targets = samples.inputs(batch).double().flatten(1), one_hot(samples.targets(batch), 3)

    def forward(h: torch.Tensor) -> list[torch.Tensor]:
        outputs = [h]
        for name, layer in layers:
            sums = outputs[-1] @ layer.weight.T + layer.bias
            outputs.append(sums if name == "head" else torch.relu(sums))
        return outputs

    feedback = 0.05 * model(tmp_path)["heads.0.feedback"]
    assert feedback.abs().max() < 0.05 * (6 / 10) ** 0.5
    with torch.no_grad():
        first = forward(x)
        error = first[-1].softmax(1) - targets
        second = forward(x + error @ feedback)
        for k, (name, layer) in enumerate(layers):
            difference = error if name == "head" else first[k + 1] - second[k + 1]
            weight = layer.weight - 0.1 / 16 * difference.T @ second[k]
            torch.testing.assert_close(
                model(tmp_path)[f"{name}.weight"], weight, rtol=1e-12, atol=0
            )


def test_blocks_that_read_samples_alone_send_nothing_in_training(tmp_path: Path) -> None:
    summary = train_tiny(tmp_path, 4, objective__name="noprop")
    assert summary["bytes_intra_node"] == summary["bytes_inter_node"] == 0


def test_codes_are_sent_once_per_update(tmp_path: Path) -> None:
    """The number of micro-batches changes neither the bytes of activations nor those of codes."""
    changes = {"objective": {"name": "ccl", "lag": 0}, "schedule__name": "drained"}
    sent = [
        train_tiny(tmp_path / str(m), 4, micro_batches=m, **changes)["bytes_intra_node"]
        for m in (1, 4)
    ]
    activations = 2 * 50 * (13 + 11 + 7)
    codes = 2 * 4 * 3 * (7 + 11)  # the codes of the last block are one-hot and are not sent
    assert sent == [8 * (activations + codes)] * 2


def test_a_lag_trains_another_model_on_any_number_of_ranks(tmp_path: Path) -> None:
    """With a lag the same codes are used one update later."""
    lagged = {"objective": {"name": "ccl", "lag": 1}, "schedule__name": "drained"}
    digests = {train_tiny(tmp_path / str(n), n, **lagged)["digest"] for n in (1, 2, 4)}
    assert len(digests) == 1
    assert train_tiny(tmp_path / "no-lag", 2, objective__name="ccl")["digest"] not in digests


def test_an_unsupported_schedule_is_refused(tmp_path: Path) -> None:
    with refuses(ConfigError, "schedule.route-unsupported"):
        train_tiny(tmp_path, objective={"name": "ccl", "lag": 1}, schedule__name="stream")
