"""Awkward objectives run through the same doors as the products, and keep their laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.errors import DtrainError
from dtrain.models import load_model
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.cafo import Cafo
from dtrain.objectives.ccl import Ccl
from dtrain.objectives.pepita import Pepita
from dtrain.schedules import SCHEDULES
from dtrain.schedules.drained import Drained
from dtrain.train import train
from tests import tiny
from tests.outcome import close, model
from tests.witness.noprop import NoProp

WITNESSES = {"pepita": Pepita, "cafo": Cafo, "noprop": NoProp, "ccl": Ccl}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let run files name the witnesses."""
    for name, kind in WITNESSES.items():
        monkeypatch.setitem(OBJECTIVES, name, kind)
    monkeypatch.setitem(SCHEDULES, "drained", Drained)


def trained(out: Path, stages: int = 1, replicas: int = 1, **told: Any) -> dict[str, Any]:
    """Train the tiny run in four blocks on `stages` x `replicas` threads."""
    run: RunConfig = tiny.run(**{"partition__blocks": 4, "mesh__stages": stages, **told})

    def work(comm: Comm) -> dict[str, Any]:
        return train(run, comm, out)

    return ranks(stages * replicas, work, seed=stages)[0]


@pytest.mark.parametrize("objective", WITNESSES)
@pytest.mark.parametrize("schedule", [None, "drained"])
def test_any_number_of_ranks_trains_the_same_bits(
    objective: str, schedule: str | None, tmp_path: Path
) -> None:
    told = {"objective__name": objective, **({"schedule__name": schedule} if schedule else {})}
    summaries = [trained(tmp_path / str(n), n, **told) for n in (1, 2, 4)]
    assert len({each["digest"] for each in summaries}) == 1
    assert summaries[0]["test_loss"] == summaries[1]["test_loss"]


@pytest.mark.parametrize("objective", WITNESSES)
def test_replicas_and_micro_batches_train_the_same_model(objective: str, tmp_path: Path) -> None:
    told = {"objective__name": objective}
    trained(tmp_path / "one", 2, **told, micro_batches=1)
    trained(tmp_path / "two", 2, 2, **told)
    close(tmp_path / "one", tmp_path / "two", 1e-9 if objective == "cafo" else 1e-12)


@pytest.mark.parametrize("objective", WITNESSES)
def test_it_learns(objective: str, tmp_path: Path) -> None:
    """The centres are easy: all methods must do far better than one third."""
    told: dict[str, Any] = {"objective__name": objective, "epochs": 25, "optimizer__lr": 0.03}
    if objective == "pepita":  # the error fades with depth: two or three layers, says the paper
        told |= {"model": {"name": "mlp", "widths": [20]}, "partition__blocks": 2}
    assert trained(tmp_path, **told)["test_accuracy_vote"] > 0.6


def features(out: Path, count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what the random layers of a run make of the training samples, and the labels."""
    run = tiny.run()
    samples = load_data(run.dataset.name, {}, run.folder).train
    x = samples.inputs(range(50)).double()
    held, made = model(out), []
    for name in ("fc1", "fc2", "fc3", "fc4"):
        x = torch.relu(x.flatten(1) @ held[f"{name}.weight"].T + held[f"{name}.bias"])
        made.append(x)
    return made[:count], samples.targets(range(50))


def test_closed_forms_leave_no_residual_along_the_features(tmp_path: Path) -> None:
    """The normal equations of CaFo: X^T (X W - Y) = 0, with all samples of both replicas."""
    trained(tmp_path, 2, 2, objective__name="cafo", epochs=1)
    made, targets = features(tmp_path, 4)
    heads = [f"heads.{block}.linear" for block in range(3)] + ["head"]
    held = model(tmp_path)
    for x, head in zip(made, heads, strict=True):
        left = x @ held[f"{head}.weight"].T + held[f"{head}.bias"] - one_hot(targets, 3)
        assert (x.T @ left).abs().max() < 1e-9
        assert left.sum(0).abs().max() < 1e-9


def test_two_passes_are_the_rule_of_the_paper(tmp_path: Path) -> None:
    """One update of PEPITA against its formula, written out layer by layer."""
    trained(
        tmp_path, 2, objective__name="pepita", optimizer={"name": "sgd", "lr": 0.1}, epochs=None,
        updates=1, micro_batches=2, partition__blocks=5,
    )  # fmt: skip
    run, net = tiny.run(), []
    samples = load_data(run.dataset.name, {}, run.folder).train
    layers = load_model("mlp", run.model.fields, run.folder, (2, 5), 3).build(
        range(5), 3, torch.float64
    )
    net = [*layers.items()]
    batch = epoch_order(50, 3, 0, "full")[:16]
    x, wanted = samples.inputs(batch).double().flatten(1), one_hot(samples.targets(batch), 3)

    def passed(h: torch.Tensor) -> list[torch.Tensor]:
        made = [h]
        for name, layer in net:
            sums = made[-1] @ layer.weight.T + layer.bias
            made.append(sums if name == "head" else torch.relu(sums))
        return made

    feedback = 0.05 * model(tmp_path)["heads.0.feedback"]
    assert feedback.abs().max() < 0.05 * (6 / 10) ** 0.5
    with torch.no_grad():
        first = passed(x)
        error = first[-1].softmax(1) - wanted
        second = passed(x + error @ feedback)
        for k, (name, layer) in enumerate(net):
            step = error if name == "head" else first[k + 1] - second[k + 1]
            weight = layer.weight - 0.1 / 16 * step.T @ second[k]
            torch.testing.assert_close(
                model(tmp_path)[f"{name}.weight"], weight, rtol=1e-12, atol=0
            )


def test_noise_is_that_of_the_sample_whatever_the_layout(tmp_path: Path) -> None:
    """Fed from data alone, a block needs no message at all in training."""
    summary = trained(tmp_path, 4, objective__name="noprop")
    assert summary["bytes_intra_node"] == summary["bytes_inter_node"] == 0


def test_codes_travel_once_per_update(tmp_path: Path) -> None:
    """Activations are as many bytes however they are cut, and so are the codes."""
    told = {"objective": {"name": "ccl", "lag": 0}, "schedule__name": "drained"}
    sent = [
        trained(tmp_path / str(m), 4, micro_batches=m, **told)["bytes_intra_node"] for m in (1, 4)
    ]
    activations = 2 * 50 * (13 + 11 + 7)
    codes = 2 * 4 * 3 * (7 + 11)  # the one-hot ones of the last block are known
    assert sent == [8 * (activations + codes)] * 2


def test_codes_of_the_update_before_are_another_training(tmp_path: Path) -> None:
    """With a lag the same messages come one update later, on any number of ranks alike."""
    told = {"objective": {"name": "ccl", "lag": 1}, "schedule__name": "drained"}
    late = {trained(tmp_path / str(n), n, **told)["digest"] for n in (1, 2, 4)}
    assert len(late) == 1
    assert trained(tmp_path / "now", 2, objective__name="ccl")["digest"] not in late


def test_a_schedule_that_cannot_says_so(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match="'stream' brings nothing back"):
        trained(tmp_path, objective={"name": "ccl", "lag": 1}, schedule__name="stream")
