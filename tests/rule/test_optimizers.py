"""Optimizers: torch's rules, fused where the memory of their tensors allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from dtrain.block.optimizer import make_optimizer

RULES: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd, damped": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "adam": (optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (optim.AdamW, {"lr": 0.01}),
    "adagrad": (optim.Adagrad, {"lr": 0.01}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01}),
}


def drawn(number: int, transposed: bool) -> Tensor:
    """Return numbers (5, 3), in rows or in columns."""
    source = torch.Generator().manual_seed(number)
    shape = (3, 5) if transposed else (5, 3)
    found = torch.randn(shape, generator=source, dtype=torch.float64)
    return found.T if transposed else found


def torchs(name: str) -> str:
    return name.partition(",")[0]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("gradient", ["rows", "columns"])
@pytest.mark.parametrize("parameter", ["rows", "columns"])
def test_a_step_is_torchs_however_tensors_lie_in_memory(
    name: str, gradient: str, parameter: str
) -> None:
    kind, fields = RULES[name]
    ours, theirs = (nn.Parameter(drawn(0, parameter == "columns").clone()) for _ in range(2))
    assert ours.is_contiguous() == (parameter == "rows")
    optimizers = (
        make_optimizer(torchs(name), fields, [ours]),
        kind([theirs], **fields, foreach=False),
    )
    for update in range(1, 4):
        for each, optimizer in zip((ours, theirs), optimizers, strict=True):
            each.grad = drawn(update, gradient == "columns").clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", RULES)
def test_a_parameter_may_learn_later_than_others(name: str) -> None:
    """So does one that takes the place of another, as factors do."""
    kind, fields = RULES[name]
    ours, theirs = ([nn.Parameter(drawn(n, False)) for n in range(2)] for _ in range(2))
    optimizers = make_optimizer(torchs(name), fields, ours), kind(theirs, **fields, foreach=False)
    for update in range(1, 5):
        for both, optimizer in zip((ours, theirs), optimizers, strict=True):
            both[0].grad = drawn(update, False)
            both[1].grad = drawn(9 + update, False) if update > 2 else None
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "fields", "dtype", "fused"),
    [
        ("adam", {}, torch.float32, True),
        ("adam", {}, torch.bfloat16, None),
        ("adam", {"foreach": True}, torch.float32, None),
        ("adam", {"fused": False}, torch.float32, False),
        ("sgd", {"momentum": 0.9}, torch.float64, True),
        ("sgd", {"momentum": 0.9, "dampening": 0.3}, torch.float64, None),
    ],
)
def test_fused_where_it_is_exact_and_nothing_else_is_chosen(
    name: str, fields: dict[str, Any], dtype: torch.dtype, fused: bool | None
) -> None:
    made = make_optimizer(name, fields, [nn.Parameter(torch.zeros(3, dtype=dtype))])
    assert made.defaults["fused"] is fused
