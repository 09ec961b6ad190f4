"""Layers that return another dtype than the model's, as under autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.models import load_model
from dtrain.models.shape_inference import infer_layers
from tests import user_nets
from tests.harness import assert_same_model, train_in_threads
from tests.outcome import model
from tests.single import one_thread  # noqa: F401


def test_shapes_are_inferred_as_the_layers_compute() -> None:
    """On the meta device autocast does nothing, so such layers are run on the CPU."""
    stack = load_model("tests.user_nets:autocast", {}, Path(), (8,), 4)
    specs = infer_layers(stack, (8,), torch.float32)
    assert {spec.dtype for spec in specs} == {torch.bfloat16}
    assert [spec.forward_macs for spec in specs] == [8 * 16, 0, 16 * 16, 16 * 4]


@pytest.mark.parametrize("objective", ["backprop", "mono-forward"])
def test_any_number_of_stages_trains_the_same_bits(objective: str, tmp_path: Path) -> None:
    tables = {"objective": {"name": objective}, "partition": {"blocks": 3}, "dtype": "float32"}
    run = user_nets.run("autocast", **tables)
    for stages in (1, 2, 3):
        train_in_threads(run, tmp_path / str(stages), stages=stages)
    assert_same_model(tmp_path / "1", tmp_path / "2")
    assert_same_model(tmp_path / "1", tmp_path / "3")
    layers = {n: t for n, t in model(tmp_path / "1").items() if not n.startswith("heads.")}
    assert {tensor.dtype for tensor in layers.values()} == {torch.float32}


def test_it_is_a_plain_loop_of_torch(tmp_path: Path) -> None:
    tables = {"data": {"normalise": False}, "epochs": 1, "micro_batches": 1}
    run = user_nets.run(
        "autocast", optimizer={"name": "sgd", "lr": 0.1, "weight-decay": 0.0}, **tables
    )
    train_in_threads(run, tmp_path)
    torch.manual_seed(1)
    net: nn.Module = user_nets.autocast((8,), 4)
    user_nets.train_plainly(net, "sgd", lr=0.1)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(model(tmp_path)[name], tensor, rtol=1e-6, atol=1e-6)


def test_replicas_train_it(tmp_path: Path) -> None:
    run = user_nets.run("autocast", dtype="float32", epochs=20, optimizer={"weight-decay": 0.0})
    assert train_in_threads(run, tmp_path, replicas=2)["test_accuracy"] > 0.6
