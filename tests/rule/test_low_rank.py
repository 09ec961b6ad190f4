"""Factors in place of a matrix: the same outputs and gradients, their names, and back again."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn, optim
from torch.func import functional_call

from dtrain.block.low_rank import FactoredWeight, LowRankWeight
from dtrain.block.parameters import BlockParameters
from dtrain.errors import NumericalError
from dtrain.models.mlp import Dense
from dtrain.syncs.common.low_rank import (
    as_matrix,
    factor_optimizer_state,
    kept_rank,
    resize_core_moments,
    resize_optimizer_state,
    svd,
)
from tests.refusals import refuses


class Twice(nn.Linear):
    """A layer that reads its weight and does not call its parent's forward."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ (2 * self.weight).T


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (6, 7)),
    "no bias": (lambda: nn.Linear(5, 9, bias=False), (4, 3, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 5)),
    "stride": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding_mode="reflect", padding=1),
        (2, 4, 7, 7),
    ),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2, dilation=2), (2, 3, 9)),
    "own class": (lambda: Dense(7, 5, torch.tanh), (6, 7)),
    "own weight": (lambda: Twice(7, 5), (6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
}


def make_layer(name: str) -> tuple[nn.Module, Tensor]:
    """Return a layer and an input."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return make().double(), torch.randn(shape, dtype=torch.float64)


def svd_factors(layer: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = svd(layer.weight)
    return u[:, :rank] * s[:rank], v[:rank]


def call_with_weight(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Return the output of the layer with another weight."""
    others = {name: p for name, p in layer.named_parameters() if name != "weight"}
    output: Tensor = functional_call(layer, {"weight": weight, **others}, (x,))
    return output


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an item for each product of factors that is computed."""
    products: list[int] = []
    product = FactoredWeight.product
    monkeypatch.setattr(FactoredWeight, "product", lambda self: products.append(1) or product(self))
    return products


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 2, 99])
def test_a_layer_of_factors_is_that_of_their_product(name: str, rank: int) -> None:
    """Outputs, and the gradients of input and of both factors, whichever way is less work."""
    layer, x = make_layer(name)
    names = [key for key, _ in layer.named_parameters()]
    left, right = (factor.requires_grad_() for factor in svd_factors(layer, rank))
    x.requires_grad_()
    expected = call_with_weight(layer, (left @ right).view(layer.weight.shape), x)
    expected_gradients = torch.autograd.grad(expected.square().sum(), [x, left, right])
    kind, call = type(layer), type(layer).forward
    low_rank = LowRankWeight(layer, left.detach(), right.detach())
    assert (type(layer), type(layer).forward) == (kind, call), "the layer keeps its class"
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(output.square().sum(), [x, low_rank.left, low_rank.right])
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)
    low_rank.merge()
    assert [key for key, _ in layer.named_parameters()] == names
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_core_stands_between_factors(name: str, rank: int, rows: int) -> None:
    """Outputs, and the gradient of the core: a map of its own for few rows, joined for many."""
    layer, x = make_layer(name)
    x = x.repeat(rows, *[1] * (x.dim() - 1))
    left, right = svd_factors(layer, rank)
    core = torch.randn(len(right), len(right), dtype=torch.float64, requires_grad=True)
    expected = call_with_weight(layer, (left @ core @ right).view(layer.weight.shape), x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), [core])
    low_rank = LowRankWeight(layer, left.detach(), core.detach(), right.detach())
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(output.square().sum(), [low_rank.factors[1]])
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)


def test_of_few_rows_a_core_is_multiplied_with_nothing_but_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Left factor and core are joined where rows are as many as outputs."""
    layer = nn.Linear(40, 30)
    left, right = svd_factors(layer, 20)
    LowRankWeight(layer, left, torch.eye(20), right)
    joined: list[int] = []
    monkeypatch.setattr(
        "dtrain.block.low_rank.matmul", lambda a, b: joined.append(len(a)) or torch.matmul(a, b)
    )
    layer(torch.randn(8, 40))
    assert not joined
    layer(torch.randn(30, 40))
    assert joined


def test_thin_factors_of_few_rows_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is computed where that is less work, and then alone."""
    layer = nn.Linear(40, 30)
    low_rank = LowRankWeight(layer, *svd_factors(layer, 2))
    products = count_products(monkeypatch)
    layer(torch.randn(8, 40))
    assert not products
    low_rank.merge()
    LowRankWeight(layer, *svd_factors(layer, 30))
    products.clear()
    layer(torch.randn(800, 40))
    assert products


def test_a_layer_computes_with_the_weight_that_it_shows() -> None:
    layer, x = make_layer("linear")
    output, weight = layer(x), layer.weight.detach().clone()
    low_rank = LowRankWeight(layer, *svd_factors(layer, 1))
    assert not torch.allclose(layer(x), output)
    low_rank.show(weight)
    assert torch.equal(layer(x), output)
    assert torch.equal(layer.weight, weight)


def make_parameters(model_ends: tuple[bool, bool] = (False, False)) -> BlockParameters:
    """Return three linear layers, the second in a module of its own with a norm, and a head."""
    torch.manual_seed(1)
    roots = {
        "a": nn.Linear(6, 5),
        "b": nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU()),
        "c": nn.Linear(4, 8),
        "heads.0": nn.Linear(8, 3),
    }
    return BlockParameters(roots, partial(optim.Adam, lr=0.1), model_ends)


def test_first_and_last_matrices_and_heads_stay_whole() -> None:
    assert make_parameters().factorizable_weights() == ["a.weight", "b.0.weight", "c.weight"]
    assert make_parameters((True, False)).factorizable_weights() == ["b.0.weight", "c.weight"]
    assert make_parameters((True, True)).factorizable_weights() == ["b.0.weight"]


def test_factors_have_names_beside_their_matrix_and_it_comes_back() -> None:
    name, block = "b.0.weight", make_parameters()
    names, before = list(block.parameters), block.parameters[name].detach().clone()
    linear = block.modules()["b.0"]
    block.factorize(name, *svd_factors(linear, 2))
    block.low_rank_weights[name].right.requires_grad_(False)
    block.rebuild_optimizer({})
    place = names.index(name)
    factor_names = [f"{name}.left", f"{name}.right"]
    assert list(block.parameters) == [*names[:place], *factor_names, *names[place + 1 :]]
    assert f"{name}.right" not in block.trainable_tensors()
    assert block.matrix_shape(name) == (4, 5)
    assert len(block.trainable_parameters) == len(block.trainable_tensors()) == len(names)
    with block.swap_tensors(block.tensors() | {name: torch.zeros(4, 5)}):
        assert torch.equal(linear.weight, torch.zeros(4, 5))  # type: ignore[arg-type]
    block.merge_factors(name)
    block.rebuild_optimizer({})
    assert list(block.parameters) == names
    assert block.parametrisation_version == 2
    u, s, v = svd(before)
    torch.testing.assert_close(block.parameters[name], (u[:, :2] * s[:2]) @ v[:2])
    assert block.parameters[name].requires_grad


def test_an_uncut_split_is_the_matrix() -> None:
    for name in ("linear", "conv2d"):
        layer, _ = make_layer(name)
        u, s, v = svd(layer.weight)
        torch.testing.assert_close((u * s) @ v, as_matrix(layer.weight), rtol=1e-12, atol=1e-12)
        assert (s.diff() <= 0).all()


def test_a_cut_keeps_up_to_the_last_large_value_and_one_at_least() -> None:
    s = torch.tensor([4.0, 2.0, 0.3, 0.1])
    assert [kept_rank(s, cutoff) for cutoff in (-1.0, 0.0, 0.05, 0.15, 0.5, 1.0)] == [
        4,
        4,
        3,
        2,
        1,
        1,
    ]
    assert kept_rank(torch.zeros(3), 0.15) == 1
    with refuses(NumericalError, "sync.svd-not-finite"):
        svd(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))


def test_the_state_of_a_factor_is_that_of_its_matrix_by_the_chain_rule() -> None:
    """Sums of gradients exactly; squares as their mean over the signs of a gradient's elements."""
    for side in ("left", "right"):
        layer = nn.Conv2d(2, 2, (1, 2), dtype=torch.float64)
        count, step = layer.weight.numel(), torch.tensor(3.0)
        size = torch.rand(layer.weight.shape, dtype=torch.float64)
        signs = torch.tensor(list(product((-1.0, 1.0), repeat=count)), dtype=torch.float64)
        gradients = [size * sign.view_as(size) for sign in signs]
        u, s, v = svd(layer.weight)
        low_rank = LowRankWeight(layer, u * s, v)
        low_rank.set_trainable(side)
        factor = getattr(low_rank, side)
        factor_gradients = []
        for gradient in gradients:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            factor_gradients += torch.autograd.grad((gradient * weight).sum(), factor)
        entries = {"exp_avg": gradients[5], "exp_avg_sq": size.square(), "step": step}
        state = {f"c.weight/{entry}": tensor for entry, tensor in entries.items()}
        factor_state = factor_optimizer_state({**state, "b/exp_avg": step}, "c.weight", low_rank)
        assert factor_state.keys() == {f"c.weight.{side}/{entry}" for entry in entries}
        torch.testing.assert_close(factor_state[f"c.weight.{side}/exp_avg"], factor_gradients[5])
        mean_square = torch.stack([gradient.square() for gradient in factor_gradients]).mean(0)
        torch.testing.assert_close(factor_state[f"c.weight.{side}/exp_avg_sq"], mean_square)
        assert factor_state[f"c.weight.{side}/step"] == 3
        # Of any other entry the state is not known: all begins anew.
        unknown = {**state, "c.weight/exp_inf": size}
        assert factor_optimizer_state(unknown, "c.weight", low_rank) == {}


def test_the_state_of_a_core_is_cut_with_it() -> None:
    old = torch.arange(12.0).view(3, 4)
    assert resize_core_moments(old, torch.Size([3, 2])).tolist() == [[0, 1], [4, 5], [8, 9]]
    state = {"w.core/m": old, "w.core/step": torch.tensor(3.0), "b/m": torch.ones(3)}
    resized = resize_optimizer_state(state, {"w.core": torch.empty(2, 2), "b": torch.empty(3)})
    assert resized.keys() == state.keys()
    assert resized["w.core/m"].tolist() == [[0, 1], [4, 5]]
    assert torch.equal(resized["b/m"], torch.ones(3))
    assert resized["w.core/step"] == 3
