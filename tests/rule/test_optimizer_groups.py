"""Parameter groups without weight decay, and a second optimizer for what is no matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn, optim

from dtrain.block.block import Block
from dtrain.block.optimizer import CompositeOptimizer, OptimizerSettings
from dtrain.block.weight_prediction import predict_weights, spike_compensated_step
from dtrain.errors import ConfigError
from tests import tiny
from tests.refusals import refuses

ADAMW = OptimizerSettings("adamw", {"lr": 0.1, "weight_decay": 0.5})


def layers() -> dict[str, nn.Module]:
    """Return an embedding, a norm and linear layers, among them one inside a container."""
    torch.manual_seed(0)
    return {
        "0": nn.Embedding(5, 4),
        "1": nn.LayerNorm(4),
        "2": nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        "3": nn.Linear(4, 3),
    }


def block(settings: OptimizerSettings) -> Block:
    return Block(0, layers(), None, settings)


def groups_of(one: Block) -> dict[str, dict[str, Any]]:
    """Return the parameter group of every parameter, by name."""
    assert one.optimizer is not None
    groups = {id(p): group for group in one.optimizer.param_groups for p in group["params"]}
    return {name: groups[id(parameter)] for name, parameter in one.parameters.items()}


def test_no_decay_matches_names_and_classes() -> None:
    """The norm is called "1.weight"; its class has the word."""
    groups = groups_of(block(replace(ADAMW, no_decay=("bias", "norm"))))
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    assert decayed == {"0.weight", "2.0.weight", "3.weight"}


def test_the_rest_is_what_is_no_hidden_matrix() -> None:
    muon = OptimizerSettings("muon", {"lr": 0.02}, ("bias",), ADAMW)
    groups = groups_of(block(muon))
    assert {name for name, group in groups.items() if group["lr"] == 0.02} == {
        "2.0.weight",
        "3.weight",
    }


def take_steps(one: Block, count: int, seed: int = 0) -> None:
    """Update a block by random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in one.trainable_parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        one.update()


def test_each_part_steps_by_its_own_rule() -> None:
    ours, plain = block(OptimizerSettings("sgd", {"lr": 0.1}, (), ADAMW)), layers()
    matrices = [plain["2"][0].weight, plain["3"].weight]  # type: ignore[index]
    matrix_ids = set(map(id, matrices))
    everything = [p for layer in plain.values() for p in layer.parameters()]
    rest = [p for p in everything if id(p) not in matrix_ids]
    rules = [optim.SGD(matrices, lr=0.1), optim.AdamW(rest, lr=0.1, weight_decay=0.5)]
    take_steps(ours, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in everything:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for rule in rules:
            rule.step()
    for mine, theirs in zip(ours.trainable_parameters, everything, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings("muon", {"lr": 0.02}, ("bias",), ADAMW),
        OptimizerSettings("sgd", {"lr": 0.02, "momentum": 0.9}, ("norm",)),
    ],
    ids=["rest", "no-decay"],
)
def test_a_restored_state_goes_on_as_it_was(settings: OptimizerSettings) -> None:
    """Parameters are in another order in the groups than in the model."""
    first, second = block(settings), block(settings)
    take_steps(first, 2)
    for mine, theirs in zip(second.trainable_parameters, first.trainable_parameters, strict=True):
        mine.data.copy_(theirs.data)
    second.load_optimizer_state({k: t.clone() for k, t in first.optimizer_state().items()})
    for one in (first, second):
        one.set_lr_factor(0.5)
        take_steps(one, 2, seed=1)
    assert all(map(torch.equal, first.trainable_parameters, second.trainable_parameters))
    rates = {group["lr"] for group in groups_of(second).values()}
    assert rates == {0.01, 0.05} if settings.rest else {0.01}


def test_predictions_keep_the_order_of_the_parameters() -> None:
    """As one optimizer for all predicts, since both parts have its rule."""
    fields = {"lr": 0.1, "momentum": 0.9}
    rest = OptimizerSettings("sgd", fields)
    composite, one = block(OptimizerSettings("sgd", fields, ("bias",), rest)), block(rest)
    for trained_block in (composite, one):
        take_steps(trained_block, 2)
    assert isinstance(composite.optimizer, CompositeOptimizer)
    assert one.optimizer is not None
    predictions = [
        predict_weights(
            "velocity", trained_block.optimizer, trained_block.trainable_parameters, 3.0, None
        )
        for trained_block in (composite, one)
        if trained_block.optimizer is not None
    ]
    assert all(map(torch.equal, *predictions))
    for trained_block in (composite, one):
        for parameter in trained_block.trainable_parameters:
            parameter.grad = torch.ones_like(parameter)
        trained_block.update(lambda optimizer: spike_compensated_step(optimizer, 2))
    assert all(map(torch.equal, composite.trainable_parameters, one.trainable_parameters))


def test_complex_parameters_leave_the_fused_step_to_others() -> None:
    """Otherwise the bits of a parameter would depend on its neighbours in the block."""
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.cfloat))]
    settings = OptimizerSettings("adam", {"lr": 0.1})
    layer = nn.Module()
    layer.real, layer.complex = parameters
    optimizer = Block(0, {"a": layer}, None, settings).optimizer
    assert optimizer is not None
    assert [group["fused"] for group in optimizer.param_groups] == [True, None]


MUON = {"name": "muon", "lr": 0.02}


@pytest.mark.parametrize(
    ("optimizer", "key"),
    [
        (MUON | {"rest": {"name": "adm"}}, "optimizer.unknown"),
        (MUON | {"rest": {"name": "adamw", "lrr": 0.1}}, "run-file.unknown-key"),
        (MUON | {"rest": {"name": "adamw", "clip": 0.1}}, "run-file.unknown-key"),
        (MUON | {"rest": "adamw"}, "run-file.no-table"),
        ({"name": "adam", "lr": "1e-3"}, "run-file.quoted-number"),
        (MUON | {"rest": {"name": "adamw", "lr": "1e-3"}}, "run-file.quoted-number"),
        ({"name": "adam", "no-decay": "bias"}, "run-file.wrong-type"),
    ],
)
def test_wrong_tables_are_refused(optimizer: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        tiny.run(optimizer=optimizer)


def test_the_resolved_run_holds_both() -> None:
    table = MUON | {"no-decay": ("bias",), "rest": {"name": "adamw", "lr": 0.1}}
    assert tiny.run(optimizer=table).to_table()["optimizer"] == table


def test_vectors_need_a_rest() -> None:
    with refuses(ConfigError, "optimizer.needs-matrices"):
        block(OptimizerSettings("muon", {"lr": 0.02}))


def test_no_decay_needs_a_decay() -> None:
    with refuses(ConfigError, "optimizer.no-decay-without-weight-decay"):
        block(OptimizerSettings("rprop", {}, ("bias",)))
