"""What objectives may ask of the seams, and what a forgetful one is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.block import optimizer as optimizers
from dtrain.block.block import Block
from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError
from dtrain.models.layers import as_layers
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.dfa import Dfa
from dtrain.objectives.mono_forward import MonoForward
from dtrain.planning.layout import make_layout
from dtrain.train import train
from tests import tiny
from tests.outcome import close

WRITING = {"name": "tests.tiny:writing"}


class Dropping(MonoForward):
    """Its heads draw random numbers."""

    def head_network(self, spec: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), super().head_network(spec))


class Normed(MonoForward):
    """Its heads have batch statistics, and are not run sample by sample as far as costs know."""

    def head_network(self, spec: Any) -> nn.Module:
        width = math.prod(spec.output_shape)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(width), nn.Linear(width, spec.classes))

    def head_input_shape(self, spec: Any) -> None: ...


KINDS = {"dropping": Dropping, "normed": Normed}
NAMED: dict[str, dict[str, Any]] = {
    "dfa": {"objective__name": "dfa", "schedule__name": "1f1b"},
    "wide": {"objective__name": "forward-forward", "objective__peer": 10.0},
    "twice": {
        "objective": {"name": "forward-forward", "negatives": "hard"},
        "schedule__name": "drained",
    },
    **{name: {"objective__name": name} for name in (*KINDS, "mono-forward")},
}
"""Runs by what they ask: an error for all blocks; a pass wider than its micro-batch, and means that
a segment hands to the next; a pass that is not traced before one that is; heads of their own."""


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let run files name them."""
    for name, kind in KINDS.items():
        monkeypatch.setitem(OBJECTIVES, name, kind)


def trained(out: Path, stages: int = 1, replicas: int = 1, **told: Any) -> dict[str, Any]:
    """Train the tiny run in four blocks on `stages` x `replicas` threads."""
    run = tiny.run(**{"partition__blocks": 4, "mesh__stages": stages, **told})

    def work(comm: Comm) -> dict[str, Any]:
        return train(run, comm, out)

    return ranks(stages * replicas, work, seed=stages)[0]


@pytest.mark.parametrize("name", NAMED)
def test_any_number_of_ranks_trains_the_same_bits(name: str, tmp_path: Path) -> None:
    told = NAMED[name]
    digests = {trained(tmp_path / str(n), n, **told)["digest"] for n in (1, 2, 4)}
    assert len(digests) == 1
    assert trained(tmp_path / "again", 1, **told)["digest"] in digests


@pytest.mark.parametrize("name", ["dfa", "wide", "twice"])
def test_replicas_and_micro_batches_train_the_same_model(name: str, tmp_path: Path) -> None:
    told = NAMED[name]
    trained(tmp_path / "one", 2, **told, micro_batches=1)
    trained(tmp_path / "two", 2, 2, **told)
    close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("net", [tiny.TABLE["model"], WRITING], ids=["mlp", "in-place"])
def test_what_is_computed_again_is_the_same(name: str, net: dict[str, Any], tmp_path: Path) -> None:
    """All passes are, and an input that a layer works on in place is kept as it came."""
    told = {**NAMED[name], "model": net}
    kept = trained(tmp_path / "kept", 2, **told)["digest"]
    assert trained(tmp_path / "again", 2, partition__recompute=True, **told)["digest"] == kept


def test_batch_statistics_of_heads_are_known(tmp_path: Path) -> None:
    """A last update of one sample is refused, as with batch statistics in layers."""
    with pytest.raises(DtrainError, match=r"batch statistics of layer 'heads\.0'"):
        trained(tmp_path, objective__name="normed", batch_size=7)


def test_what_an_objective_forgets_to_tell_is_no_gradient(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that has a route of its own, but does not say what travels on it."""
    monkeypatch.setattr(Dfa, "make_message", Objective.make_message)
    with pytest.raises(AssertionError, match="is the objective's to say"):
        trained(tmp_path, 2, **NAMED["dfa"])


def test_a_layer_in_place_leaves_the_output_before_it() -> None:
    """With a graph that is cut at every layer, outputs are what layers made."""
    layers = {"one": nn.Linear(4, 4), "two": nn.ReLU(inplace=True)}
    step = lambda parameters: optimizers.make_optimizer("sgd", {"lr": 0.1}, parameters)  # noqa: E731
    block = Block(0, layers, None, step, detach_every="layer")
    x = torch.randn(8, 4)
    outs = block.run_forward(x, (), True)["layer_outputs"]
    assert torch.equal(outs["one"], layers["one"](x))
    assert outs["one"].min() < 0


def test_blocks_that_are_not_there_cannot_be_computed_again(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match=r"names block 7, but there are 4 \(0 to 3\)"):
        trained(tmp_path, partition__recompute=[1, 7])


def test_heads_are_priced_where_they_stand() -> None:
    """12 channels have no 8 groups, but no block ends there."""
    model = {"name": "cnn", "widths": [[12, 16], [16]], "norm": "none"}
    objective = {"name": "local-head", "head": "dgl", "norm": "group", "groups": 8}
    run = tiny.run(model=model, objective=objective, partition={"cuts": [2]}, mesh__stages=2)
    net = as_layers(lambda: _layers(run), "cnn")
    assert (
        make_layout(run, net, BlockSpec.from_data((3, 8, 8), 3), 2).block_layouts[0].head_parameters
        > 0
    )


def _layers(run: Any) -> Any:
    from dtrain.models.cnn import Cnn

    return Cnn(((12, 16), (16,)), norm="none").layers((3, 8, 8), 3)
