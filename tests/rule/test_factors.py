"""Factors in the place of a matrix: the same maps, the same gradients, names, and back again."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn, optim
from torch.func import functional_call

from dtrain.block.low_rank import FactoredWeight, LowRankWeight
from dtrain.block.parameters import BlockParameters
from dtrain.errors import DtrainError
from dtrain.models.mlp import Dense
from dtrain.syncs.common.low_rank import (
    as_matrix,
    factor_optimizer_state,
    kept_rank,
    resize_core_moments,
    resize_optimizer_state,
    svd,
)


class Twice(nn.Linear):
    """A layer that goes by its weight, not by its parent's forward."""

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


def drawn(name: str) -> tuple[nn.Module, Tensor]:
    """Return a layer and an input."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return make().double(), torch.randn(shape, dtype=torch.float64)


def factors(layer: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = svd(layer.weight)
    return u[:, :rank] * s[:rank], v[:rank]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 2, 99])
def test_a_layer_of_factors_is_that_of_their_product(name: str, rank: int) -> None:
    """Outputs, and the gradients of input and of both factors; whichever way is less work."""
    layer, x = drawn(name)
    left, right = factors(layer, rank)
    left, right = left.requires_grad_(), right.requires_grad_()
    x.requires_grad_()
    product = (left @ right).view(layer.weight.shape)
    rest = {key: each for key, each in layer.named_parameters() if key != "weight"}
    wanted = functional_call(layer, {"weight": product, **rest}, (x,))
    told = torch.autograd.grad(wanted.square().sum(), [x, left, right])
    made = LowRankWeight(layer, left.detach(), right.detach())
    found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    own = torch.autograd.grad(found.square().sum(), [x, made.left, made.right])
    for mine, theirs in zip(own, told, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    names, kind = [*rest], type(drawn(name)[0])
    made.merge()
    assert type(layer) is kind
    assert [key for key, _ in layer.named_parameters()] == ["weight", *names]
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_core_stands_between_factors(name: str, rank: int, rows: int) -> None:
    """Outputs, and the gradient of the core: a map of its own for few rows, joined for many."""
    layer, x = drawn(name)
    x = x.repeat(rows, *[1] * (x.dim() - 1))
    left, right = factors(layer, rank)
    core = torch.randn(len(right), len(right), dtype=torch.float64, requires_grad=True)
    product = (left @ core @ right).view(layer.weight.shape)
    rest = {key: each for key, each in layer.named_parameters() if key != "weight"}
    wanted = functional_call(layer, {"weight": product, **rest}, (x,))
    (told,) = torch.autograd.grad(wanted.square().sum(), [core])
    made = LowRankWeight(layer, left.detach(), core.detach(), right.detach())
    found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    (own,) = torch.autograd.grad(found.square().sum(), [made.factors[1]])
    torch.testing.assert_close(own, told, rtol=1e-11, atol=1e-11)


def test_of_few_rows_a_core_is_multiplied_with_nothing_but_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Left and core are made one where rows are as many as outputs."""
    layer = nn.Linear(40, 30)
    left, right = factors(layer, 20)
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
    """The product is made where that is less work, and then alone."""
    layer = nn.Linear(40, 30)
    made = LowRankWeight(layer, *factors(layer, 2))
    calls: list[int] = []
    product = FactoredWeight.product
    monkeypatch.setattr(FactoredWeight, "product", lambda self: calls.append(1) or product(self))
    layer(torch.randn(8, 40))
    assert not calls
    made.merge()
    LowRankWeight(layer, *factors(layer, 30))
    calls.clear()
    layer(torch.randn(800, 40))
    assert calls


def test_what_is_shown_is_what_computes() -> None:
    layer, x = drawn("linear")
    plain = layer(x)
    weight = layer.weight.detach().clone()
    made = LowRankWeight(layer, *factors(layer, 1))
    assert not torch.allclose(layer(x), plain)
    made.show(weight)
    assert torch.equal(layer(x), plain)
    assert torch.equal(layer.weight, weight)


def block(ends: tuple[bool, bool] = (False, False)) -> BlockParameters:
    """Three linear layers, the last in a module of its own, a norm, and a head."""
    torch.manual_seed(1)
    roots = {
        "a": nn.Linear(6, 5),
        "b": nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU()),
        "c": nn.Linear(4, 8),
        "heads.0": nn.Linear(8, 3),
    }
    return BlockParameters(roots, partial(optim.Adam, lr=0.1), ends)


def test_first_and_last_matrices_and_heads_stay_whole() -> None:
    assert block().factorizable_weights() == ["a.weight", "b.0.weight", "c.weight"]
    assert block((True, False)).factorizable_weights() == ["b.0.weight", "c.weight"]
    assert block((True, True)).factorizable_weights() == ["b.0.weight"]


def test_factors_have_names_beside_their_matrix_and_it_comes_back() -> None:
    own = block()
    names, before = list(own.parameters), own.parameters["b.0.weight"].detach().clone()
    assert list(own.parameters) == names
    own.factorize("b.0.weight", *factors(own.roots["b"][0], 2))  # type: ignore[index]
    own.low_rank_weights["b.0.weight"].right.requires_grad_(False)
    own.rebuild_optimizer({})
    found = list(own.parameters)
    place = names.index("b.0.weight")
    assert found == [*names[:place], "b.0.weight.left", "b.0.weight.right", *names[place + 1 :]]
    assert "b.0.weight.right" not in own.trainable_tensors()
    assert own.matrix_shape("b.0.weight") == (4, 5)
    assert len(own.trainable_parameters) == len(own.trainable_tensors()) == len(names)
    view = {
        name: torch.zeros(4, 5) if name == "b.0.weight" else t for name, t in own.tensors().items()
    }
    view["b.0.weight"] = torch.zeros(4, 5)
    with own.swap_tensors(view):
        assert torch.equal(own.roots["b"][0].weight, torch.zeros(4, 5))  # type: ignore[index]
    own.merge_factors("b.0.weight")
    own.rebuild_optimizer({})
    assert list(own.parameters) == names
    assert own.parametrisation_version == 2
    u, s, v = svd(before)
    torch.testing.assert_close(own.parameters["b.0.weight"], (u[:, :2] * s[:2]) @ v[:2])
    assert own.parameters["b.0.weight"].requires_grad


def test_an_uncut_split_is_the_matrix() -> None:
    for name in ("linear", "conv2d"):
        layer, _ = drawn(name)
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
    with pytest.raises(DtrainError, match=r"a weight of \(2, 2\) is not finite"):
        svd(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))


def test_the_state_of_a_factor_is_that_of_its_matrix_by_the_chain_rule() -> None:
    """Sums of gradients exactly; squares as their mean over the signs of a gradient's elements."""
    for side in ("left", "right"):
        layer = nn.Conv2d(3, 2, (1, 2), dtype=torch.float64)
        count, step = layer.weight.numel(), torch.tensor(3.0)
        size = torch.rand(layer.weight.shape, dtype=torch.float64)
        signs = torch.tensor(list(product((-1.0, 1.0), repeat=count)), dtype=torch.float64)
        gradients = [size * each.view_as(size) for each in signs]
        u, s, v = svd(layer.weight)
        pair = LowRankWeight(layer, u * s, v)
        pair.set_trainable(side)
        learns = getattr(pair, side)
        true = []
        for gradient in gradients:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            true += torch.autograd.grad((gradient * weight).sum(), learns)
        memory = {"exp_avg": gradients[5], "exp_avg_sq": size.square(), "step": step}
        own = {f"c.weight/{entry}": each for entry, each in memory.items()}
        found = factor_optimizer_state({**own, "b/exp_avg": step}, "c.weight", pair)
        keys = {f"c.weight.{side}/{entry}" for entry in memory}
        assert found.keys() == keys
        torch.testing.assert_close(found[f"c.weight.{side}/exp_avg"], true[5])
        wanted = torch.stack([each.square() for each in true]).mean(0)
        torch.testing.assert_close(found[f"c.weight.{side}/exp_avg_sq"], wanted)
        assert found[f"c.weight.{side}/step"] == 3
        # What is neither cannot be known: all begins anew.
        assert factor_optimizer_state({**own, "c.weight/exp_inf": size}, "c.weight", pair) == {}


def test_the_state_of_a_core_is_cut_with_it() -> None:
    old = torch.arange(12.0).view(3, 4)
    assert resize_core_moments(old, torch.Size([3, 2])).tolist() == [[0, 1], [4, 5], [8, 9]]
    memory = {"w.core/m": old, "w.core/step": torch.tensor(3.0), "b/m": torch.ones(3)}
    found = resize_optimizer_state(memory, {"w.core": torch.empty(2, 2), "b": torch.empty(3)})
    assert found.keys() == memory.keys()
    assert found["w.core/m"].tolist() == [[0, 1], [4, 5]]
    assert torch.equal(found["b/m"], torch.ones(3))
    assert found["w.core/step"] == 3
