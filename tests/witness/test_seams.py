"""The interface of objectives: unusual needs are served, and incomplete objectives are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.block.optimizer import OptimizerSettings
from dtrain.errors import ConfigError, DtrainError
from dtrain.models.cnn import Cnn
from dtrain.models.layers import as_layers
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.dfa import Dfa
from dtrain.objectives.mono_forward import MonoForward
from dtrain.planning.layout import make_layout
from tests import tiny
from tests.harness import train_in_threads
from tests.outcome import close

WRITING = {"name": "tests.tiny:writing"}


class Dropping(MonoForward):
    """Its heads use random numbers."""

    def build_head(self, spec: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), super().build_head(spec))


class Normalised(MonoForward):
    """Its heads have batch statistics, and no input shape from which their cost is measured."""

    def build_head(self, spec: Any) -> nn.Module:
        width = math.prod(spec.output_shape)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(width), nn.Linear(width, spec.classes))

    def head_input_shape(self, spec: Any) -> None: ...


OWN_OBJECTIVES = {"dropping": Dropping, "normalised": Normalised}
RUNS: dict[str, dict[str, Any]] = {
    "dfa": {"objective__name": "dfa", "schedule__name": "1f1b"},
    "wide": {"objective__name": "forward-forward", "objective__peer": 10.0},
    "two-passes": {
        "objective": {"name": "forward-forward", "negatives": "hard"},
        "schedule__name": "drained",
    },
    **{name: {"objective__name": name} for name in (*OWN_OBJECTIVES, "mono-forward")},
}
"""Changes of the tiny run by their unusual need.

"dfa": an error for all blocks. "wide": a pass with more rows than its micro-batch, and means that
are kept from segment to segment. "two-passes": a pass without a graph before one with a graph. The
others: heads of their own.
"""


@pytest.fixture(autouse=True)
def register_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the objectives names in run files."""
    for name, kind in OWN_OBJECTIVES.items():
        monkeypatch.setitem(OBJECTIVES, name, kind)


def train_tiny(out: Path, stages: int = 1, replicas: int = 1, **changes: Any) -> dict[str, Any]:
    """Train the tiny run in four blocks on `stages` x `replicas` threads."""
    run = tiny.run(**{"partition__blocks": 4, "mesh__stages": stages, **changes})
    return train_in_threads(run, out, stages, replicas)


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_ranks_trains_the_same_bits(name: str, tmp_path: Path) -> None:
    changes = RUNS[name]
    digests = {train_tiny(tmp_path / str(n), n, **changes)["digest"] for n in (1, 2, 4)}
    assert len(digests) == 1
    assert train_tiny(tmp_path / "again", 1, **changes)["digest"] in digests


@pytest.mark.parametrize("name", ["dfa", "wide", "two-passes"])
def test_replicas_and_micro_batches_train_the_same_model(name: str, tmp_path: Path) -> None:
    train_tiny(tmp_path / "one", 2, **RUNS[name], micro_batches=1)
    train_tiny(tmp_path / "two", 2, 2, **RUNS[name])
    close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("net", [tiny.TABLE["model"], WRITING], ids=["mlp", "in-place"])
def test_recomputation_changes_no_bit(name: str, net: dict[str, Any], tmp_path: Path) -> None:
    """All passes are recomputed, and layers that work in place do not change a block's input."""
    changes = {**RUNS[name], "model": net}
    without = train_tiny(tmp_path / "without", 2, **changes)
    recomputed = train_tiny(tmp_path / "recomputed", 2, partition__recompute=True, **changes)
    assert recomputed["digest"] == without["digest"]


def test_batch_statistics_of_heads_are_checked(tmp_path: Path) -> None:
    """A last update of one sample is refused, as with batch statistics in layers."""
    with pytest.raises(DtrainError) as caught:
        train_tiny(tmp_path, objective__name="normalised", batch_size=7)
    assert "'heads.0'" in caught.value.message


def test_an_objective_must_make_the_messages_of_its_own_routes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The default makes activations, votes and gradients alone."""
    monkeypatch.setattr(Dfa, "make_message", Objective.make_message)
    with pytest.raises(AssertionError) as caught:
        train_tiny(tmp_path, 2, **RUNS["dfa"])
    assert caught.traceback[-1].name == "make_message"


def test_a_layer_in_place_does_not_change_the_output_before_it() -> None:
    """With a graph that is detached at every layer, each output is kept as its layer made it."""
    layers = {"one": nn.Linear(4, 4), "two": nn.ReLU(inplace=True)}
    sgd = OptimizerSettings("sgd", {"lr": 0.1})
    block = Block(0, layers, None, sgd, detach_every="layer")
    x = torch.randn(8, 4)
    outputs = block.run_forward(MicroBatch(x=x)).layer_outputs
    assert torch.equal(outputs["one"], layers["one"](x))
    assert outputs["one"].min() < 0


def test_recomputation_of_a_missing_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train_tiny(tmp_path, partition__recompute=[1, 7])
    assert "block 7" in caught.value.message


def test_heads_are_measured_only_at_the_ends_of_blocks() -> None:
    """12 channels do not split into 8 groups, but no block ends there."""
    model = {"name": "cnn", "widths": [[12, 16], [16]], "norm": "none"}
    objective = {"name": "local-head", "head": "dgl", "norm": "group", "groups": 8}
    run = tiny.run(model=model, objective=objective, partition={"cuts": [2]}, mesh__stages=2)
    cnn = Cnn(((12, 16), (16,)), norm="none")
    layer_stack = as_layers(lambda: cnn.layers((3, 8, 8), 3), "cnn")
    layout = make_layout(run, layer_stack, BlockSpec.from_data((3, 8, 8), 3), 2)
    assert layout.block_layouts[0].head_parameters > 0
