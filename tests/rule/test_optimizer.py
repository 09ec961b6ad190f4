"""Optimizers and clipping: torch's rules, fused where the memory of the tensors allows it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from dtrain.block.optimizer import (
    check_optimizer,
    clip_by_norm_,
    make_optimizer,
    optimizer_classes,
    squared_norm,
)
from dtrain.errors import ConfigError
from tests.refusals import refuses

RULES: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd, damped": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "adam": (optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (optim.AdamW, {"lr": 0.01}),
    "adagrad": (optim.Adagrad, {"lr": 0.01}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01}),
}


def random_matrix(seed: int, transposed: bool) -> Tensor:
    """Return numbers (5, 3), in memory row by row, or column by column."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 5) if transposed else (5, 3)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    return matrix.T if transposed else matrix


def optimizer_name(rule: str) -> str:
    return rule.partition(",")[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gradient", ["rows", "columns"])
@pytest.mark.parametrize("parameter", ["rows", "columns"])
def test_a_step_is_torchs_however_tensors_lie_in_memory(
    rule: str, gradient: str, parameter: str
) -> None:
    optimizer_class, fields = RULES[rule]
    ours, theirs = (nn.Parameter(random_matrix(0, parameter == "columns").clone()) for _ in "ab")
    assert ours.is_contiguous() == (parameter == "rows")
    optimizers = (
        make_optimizer(optimizer_name(rule), fields, [ours]),
        optimizer_class([theirs], **fields, foreach=False),
    )
    for update in range(1, 4):
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            weights.grad = random_matrix(update, gradient == "columns").clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_may_learn_later_than_others(rule: str) -> None:
    """So does one that replaces another, as factors do."""
    optimizer_class, fields = RULES[rule]
    ours, theirs = ([nn.Parameter(random_matrix(n, False)) for n in range(2)] for _ in "ab")
    optimizers = (
        make_optimizer(optimizer_name(rule), fields, ours),
        optimizer_class(theirs, **fields, foreach=False),
    )
    for update in range(1, 5):
        for (first, second), optimizer in zip((ours, theirs), optimizers, strict=True):
            first.grad = random_matrix(update, False)
            second.grad = random_matrix(9 + update, False) if update > 2 else None
            optimizer.step()
    for weights, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(weights, expected, rtol=1e-13, atol=1e-13)


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
    optimizer = make_optimizer(name, fields, [nn.Parameter(torch.zeros(3, dtype=dtype))])
    assert optimizer.defaults["fused"] is fused


@pytest.mark.parametrize("name", sorted(optimizer_classes()))
def test_every_optimizer_of_torch_steps(name: str) -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = make_optimizer(name, {}, [parameter])
    parameter.square().sum().backward()
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("name", "fields", "key"),
    [
        ("adm", {}, "optimizer.unknown"),
        ("lbfgs", {}, "optimizer.unknown"),
        ("adam", {"momentum": 0.9}, "run-file.unknown-key"),
        ("sgd", {"lr": -1.0}, "optimizer.rejected"),
    ],
)
def test_wrong_optimizers_are_refused(name: str, fields: dict[str, float], key: str) -> None:
    with refuses(ConfigError, key):
        check_optimizer(name, fields)


# ---- clipping

SHAPES = [(7, 5), (), (3, 2, 2), (0,), (11,)]


def random_gradients(dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of several shapes, one of them a transposed view."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [tensors[0].to(dtype).T, *(tensor.to(dtype) for tensor in tensors[1:])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 3.0, 100.0])
def test_a_clip_is_torchs(dtype: torch.dtype, max_norm: float) -> None:
    parameters = [nn.Parameter(torch.zeros_like(tensor)) for tensor in random_gradients(dtype)]
    for parameter, gradient in zip(parameters, random_gradients(dtype), strict=True):
        parameter.grad = gradient.clone()
    torchs_norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    gradients = random_gradients(dtype)
    norm = math.sqrt(squared_norm(gradients))
    rounding = torch.finfo(dtype).eps
    assert norm == pytest.approx(torchs_norm, rel=4 * rounding)
    clip_by_norm_(gradients, norm, max_norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=8 * rounding, atol=0)
    clipped_norm = math.sqrt(squared_norm(gradients))
    assert clipped_norm == pytest.approx(min(max_norm, norm), rel=max(1e-5, 4 * rounding))


def test_squares_are_summed_in_float64() -> None:
    """In float32 two thousand ones would vanish beside 1e8."""
    total = squared_norm([torch.tensor([1e4]), torch.full((2000,), 1.0)])
    assert total == pytest.approx(1e8 + 2000, rel=1e-14)
    mixed = torch.ones(2001)
    mixed[0] = 1e4
    assert squared_norm([mixed]) == pytest.approx(1e8 + 2000, rel=1e-14)
    assert squared_norm([]) == 0.0


def test_blocks_add_up_to_the_model() -> None:
    gradients = random_gradients(torch.float64)
    total = squared_norm(gradients[:2]) + squared_norm(gradients[2:])
    assert total == pytest.approx(squared_norm(gradients), rel=1e-15)


def test_small_gradients_are_untouched_bit_for_bit() -> None:
    gradients = random_gradients(torch.float32)
    before = [gradient.clone() for gradient in gradients]
    clip_by_norm_(gradients, math.sqrt(squared_norm(gradients)), 1000.0)
    zeros = [torch.zeros(3)]
    clip_by_norm_(zeros, 0.0, 1.0)
    assert all(map(torch.equal, gradients, before))
    assert torch.equal(zeros[0], torch.zeros(3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients(value: float) -> None:
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([value])]
    norm = math.sqrt(squared_norm(gradients))
    assert not math.isfinite(norm)
    clip_by_norm_(gradients, norm, 0.1)
    assert gradients[0].tolist() == [1.0, 2.0]
