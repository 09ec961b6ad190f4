"""The objectives `lls`, `lls-m` and `lls-mxm`: waves, scores, gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.lls import Lls, LlsBase, LlsM, LlsMxM, waves
from dtrain.rng import seeded
from tests.refusals import refuses
from tests.rule.warning_numbers import numbers_in

D = torch.float64
NAMES = ["lls", "lls-m", "lls-mxm"]
every_variant = pytest.mark.parametrize("objective", [Lls(), LlsM(), LlsMxM()], ids=NAMES)


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def make_spec(
    output_shape: tuple[int, ...], classes: int = 4, block: int = 0, blocks: int = 3
) -> BlockSpec:
    return BlockSpec(block, blocks, (6,), output_shape, D, classes)


def make_head(objective: LlsBase, spec: BlockSpec) -> nn.Module:
    with seeded("lls"):
        return objective.build_head(spec).to(D)


# The waves


def test_waves_are_sines_of_evenly_spaced_frequencies() -> None:
    t = np.arange(30)
    expected = np.stack([np.sin(w * t) for w in (50, 50 + 154, 50 + 308, 512)])
    np.testing.assert_allclose(waves("sine", 4, 30).numpy(), expected, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(waves("square", 4, 30).numpy(), np.sign(expected))


@pytest.mark.parametrize(("classes", "most"), [(10, 0.004), (100, 0.036)])
def test_waves_are_nearly_orthogonal(classes: int, most: float) -> None:
    """The Gram matrix is about (d/2) I; the correlations are those of 2048 numbers."""
    basis = waves("sine", classes, 2048)
    gram = basis @ basis.T / 1024
    assert (gram.diagonal() - 1).abs().max() < 0.02
    unit = basis / basis.norm(dim=1, keepdim=True)
    assert (unit @ unit.T).fill_diagonal_(0).abs().max().item() == pytest.approx(most, abs=5e-4)
    assert torch.linalg.matrix_rank(basis) == classes


def test_float32_heads_have_the_waves_of_float64() -> None:
    """In float32 the argument of the sine, up to 1e6, would be off by 0.06 rad."""
    basis = make_head(Lls(), make_spec((2048,), 10)).float().basis
    assert isinstance(basis, Tensor)
    assert torch.equal(basis, waves("sine", 10, 2048).float())


# The scores


@every_variant
@pytest.mark.parametrize("basis", ["sine", "square"])
def test_scores_compare_the_normalised_output_with_the_waves(
    objective: LlsBase, basis: Any
) -> None:
    head = make_head(type(objective)(basis=basis, temperature=0.5), make_spec((9,)))
    h = torch.randn(5, 9, dtype=D)
    expected = h / h.norm(dim=1, keepdim=True) @ waves(basis, 4, 9).T
    parameters = dict(head.named_parameters())
    if isinstance(objective, LlsM):
        expected = expected * parameters.pop("modulation")
    if isinstance(objective, LlsMxM):
        expected = expected @ parameters.pop("modulation")
    torch.testing.assert_close(head(h), expected / 0.5, rtol=1e-13, atol=1e-14)
    assert not parameters


@every_variant
def test_the_scale_of_an_output_has_no_effect(objective: LlsBase) -> None:
    head, h = make_head(objective, make_spec((9,))), torch.randn(5, 9, dtype=D)
    torch.testing.assert_close(head(h), head(1e3 * h), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("objective", "shape"), [(LlsM(), (100,)), (LlsMxM(), (100, 100))])
def test_modulations_start_small(objective: LlsBase, shape: tuple[int, ...]) -> None:
    [parameters] = make_head(objective, make_spec((9,), 100)).parameters()
    assert parameters.shape == shape
    assert parameters.std().item() == pytest.approx(0.01, rel=0.25)
    assert abs(parameters.mean().item()) < 0.004


@every_variant
def test_images_are_averaged_down(objective: LlsBase) -> None:
    head = make_head(type(objective)(features=40), make_spec((8, 6, 6)))
    x = torch.randn(5, 8, 6, 6, dtype=D)
    same = make_head(type(objective)(), make_spec((32,)))
    torch.testing.assert_close(head(x), same(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))


# Learning


def test_the_gradient_is_the_closed_form() -> None:
    """dL/dh = (1 - f f^T) S^T (softmax(G) - Y) / (rows |h|), at temperature 1."""
    h = torch.randn(5, 9, dtype=D, requires_grad=True)
    y = torch.randint(0, 4, (5,))
    spec = make_spec((9,))
    block = Block(0, {"one": nn.Identity()}, make_head(Lls(), spec), sgd)
    [(loss, factor)] = Lls().backward_pairs(spec, block, MicroBatch(h, h, y))
    loss.backward(factor)
    length = h.detach().norm(dim=1, keepdim=True)
    f, basis = h.detach() / length, waves("sine", 4, 9)
    gradient = ((f @ basis.T).softmax(1) - one_hot(y, 4)) @ basis / 5
    expected = (gradient - f * (f * gradient).sum(1, keepdim=True)) / length
    torch.testing.assert_close(h.grad, expected, rtol=1e-12, atol=1e-15)


@every_variant
def test_one_block_is_ordinary_backprop(objective: LlsBase) -> None:
    spec = make_spec((4,), block=0, blocks=1)
    assert objective.make_head(spec) is None
    x, y, layer = torch.randn(5, 6, dtype=D), torch.randint(0, 4, (5,)), nn.Linear(6, 4).to(D)
    block = Block(0, {"head": layer}, None, sgd)
    micro_batch = MicroBatch(x, block.forward(x, ()), y)
    block.backward(objective.backward_pairs(spec, block, micro_batch))
    expected = torch.autograd.grad(cross_entropy(layer(x), y), layer.weight)
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, expected[0])


def test_outputs_of_nothing_but_zeros_teach_nothing() -> None:
    """As with only idle units: no division by zero."""
    spec = make_spec((9,))
    layer = nn.Sequential(nn.Linear(6, 9), nn.ReLU()).to(D)
    nn.init.constant_(layer[0].bias, -100.0)
    block = Block(0, {"one": layer}, make_head(Lls(), spec), sgd)
    x = torch.randn(5, 6, dtype=D)
    micro_batch = MicroBatch(x, block.forward(x, ()), torch.zeros(5, dtype=torch.int64))
    block.backward(Lls().backward_pairs(spec, block, micro_batch))
    assert micro_batch.loss is not None
    assert micro_batch.loss.item() == pytest.approx(math.log(4))
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


# Warnings and errors


def test_narrow_blocks_are_warned_of() -> None:
    """Block 0 has 16 numbers for 10 classes; the largest correlation is 0.82."""
    specs = [make_spec((16,), 10, 0), make_spec((61,), 10, 1), make_spec((10,), 10, 2)]
    [warning] = Lls().warnings(specs, 32)
    assert warning.startswith("block 0 ")
    assert {"16", "0.82"} <= numbers_in(warning)


def test_wrong_numbers_are_refused() -> None:
    with refuses(ConfigError, "objective.temperature-not-positive"):
        Lls(temperature=0.0)
    with refuses(ConfigError, "objective.features-too-small"):
        LlsM(features=0)


def test_all_three_are_registered() -> None:
    assert [OBJECTIVES[name] for name in NAMES] == [Lls, LlsM, LlsMxM]
