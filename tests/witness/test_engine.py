"""Awkward orders and an awkward sync, run by the engine: the laws that they must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dtrain import data, models
from dtrain.comm.comm import Comm
from dtrain.comm.threads import run as ranks
from dtrain.data import order
from dtrain.errors import Refusal
from dtrain.schedules import SCHEDULES
from dtrain.schedules.pipelined import Pipelined
from dtrain.train import train
from tests import tiny
from tests.outcome import model
from tests.witness.fold import Fold
from tests.witness.interleaved import Interleaved
from tests.witness.split import Split

ORDERS = {"split": Split, "fold": Fold, "interleaved": Interleaved}
NETS = {
    "mlp": {"name": "mlp", "widths": [13, 11, 7, 6]},
    "dropping": {"name": "tests.tiny:dropping"},
    "normalised": {"name": "tests.tiny:normalised"},
    "writing": {"name": "tests.tiny:writing"},
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let run files name the witnesses."""
    for name, kind in {**ORDERS, "pipelined": Pipelined}.items():
        monkeypatch.setitem(SCHEDULES, name, kind)


def trained(out: Path, stages: int = 1, replicas: int = 1, **told: Any) -> dict[str, Any]:
    """Train the tiny run in four blocks by backpropagation on `stages` x `replicas` threads."""
    named = {"partition__blocks": 4, "mesh__stages": stages, "objective__name": "backprop"}

    def work(comm: Comm) -> dict[str, Any]:
        return train(tiny.run(**{**named, **told}), comm, out)

    return ranks(stages * replicas, work, seed=stages)[0]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("schedule", ORDERS)
def test_every_synchronous_order_trains_the_same_bits(
    schedule: str, net: str, tmp_path: Path
) -> None:
    """Chunks on a loop, a V with the loss on the first rank, a backward in two halves."""
    told = {"model": NETS[net]}
    wanted = trained(tmp_path / "1f1b", 2, schedule__name="1f1b", **told)["digest"]
    for stages in (1, 2, 4):
        out = tmp_path / str(stages)
        assert trained(out, stages, schedule__name=schedule, **told)["digest"] == wanted


@pytest.mark.parametrize("objective", ["mono-forward", "backprop"])
@pytest.mark.parametrize("schedule", ["1f1b", "split"])
def test_what_is_computed_again_is_the_same(objective: str, schedule: str, tmp_path: Path) -> None:
    """Activation recomputation changes no bit, not even of batch statistics or dropout."""
    for net in NETS:
        told = {"model": NETS[net], "schedule__name": schedule, "objective__name": objective}
        one = trained(tmp_path / net / "kept", 2, **told)
        two = trained(tmp_path / net / "again", 2, partition__recompute=True, **told)
        some = trained(tmp_path / net / "some", 2, partition__recompute=[1], **told)
        assert one["digest"] == two["digest"] == some["digest"]


@pytest.mark.parametrize("net", ["mlp", "writing", "dropping"])
def test_pipelined_is_the_same_on_any_number_of_ranks(net: str, tmp_path: Path) -> None:
    """Delays count blocks, not ranks: one rank with four blocks is the delay simulator."""
    told = {"schedule__name": "pipelined", "micro_batches": 1, "batch_size": 5, "model": NETS[net]}
    summaries = [trained(tmp_path / str(n), n, **told) for n in (1, 2, 4)]
    assert len({each["digest"] for each in summaries}) == 1
    assert summaries[2]["staleness"] == [6, 4, 2, 0]


def test_pipelined_learns_with_the_weights_of_its_moment(tmp_path: Path) -> None:
    """Against a loop: forward with w_t, backward with w_{t+D}, D = 2 (3 - b)."""
    told = {"schedule__name": "pipelined", "micro_batches": 1, "epochs": 1, "batch_size": 5}
    trained(tmp_path, 2, **told, optimizer={"name": "sgd", "lr": 0.05}, model=NETS["mlp"])
    run = tiny.run()
    samples = data.load(run.dataset.name, {}, run.folder).train
    layers = models.load("mlp", run.model.fields, run.folder, (2, 5), 3).build(
        range(5), 3, torch.float64
    )
    blocks = [["fc1"], ["fc2"], ["fc3"], ["fc4", "head"]]
    batches = order(50, 3, 0, "full").reshape(10, 5)
    kept: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    told_down: dict[tuple[int, int], torch.Tensor] = {}
    out: dict[tuple[int, int], torch.Tensor] = {}
    for cycle in range(10 + 6):
        for b in range(4):
            if 0 <= (m := cycle - b) < 10:
                x = out[b - 1, m] if b else samples.inputs(batches[m]).flatten(1)
                kept[b, m] = []
                for name in blocks[b]:
                    sums = x @ layers[name].weight.T + layers[name].bias
                    kept[b, m].append((x, sums))
                    x = sums if name == "head" else torch.relu(sums)
                out[b, m] = x.detach()
        steps = []
        for b in range(4):
            if not 0 <= (m := cycle - 6 + b) < 10:
                continue
            force = told_down.get((b, m))
            if force is None:
                scores = out[b, m].requires_grad_()
                loss = cross_entropy(scores, samples.targets(batches[m]))
                (force,) = torch.autograd.grad(loss, scores)
            for name, (x, sums) in zip(blocks[b][::-1], kept[b, m][::-1], strict=True):
                force = force if name == "head" else force * (sums > 0)
                steps.append((name, force.T @ x, force.sum(0)))
                force = force @ layers[name].weight
            told_down[b - 1, m] = force
        with torch.no_grad():
            for name, weight, bias in steps:
                layers[name].weight -= 0.05 * weight
                layers[name].bias -= 0.05 * bias
    for name, layer in layers.items():
        torch.testing.assert_close(
            model(tmp_path)[f"{name}.weight"], layer.weight.detach(), rtol=1e-12, atol=1e-15
        )


def test_pipelined_refuses_micro_batches(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="set micro-batches = 1"):
        trained(tmp_path, 2, schedule__name="pipelined", micro_batches=3)
