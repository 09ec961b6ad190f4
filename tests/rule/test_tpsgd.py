"""The objective `tpsgd`: the targets of labels, and residuals that vanish at them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.tpsgd import TpSgd
from dtrain.rng import seeded

D = torch.float64


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def make_spec(output_shape: tuple[int, ...], block: int = 0, blocks: int = 2) -> BlockSpec:
    return BlockSpec(block, blocks, (8,), output_shape, D, 5)


def make_block(
    layer: nn.Module, spec: BlockSpec, objective: TpSgd
) -> tuple[Tensor, Tensor, Tensor, Block]:
    """Return data, labels, their targets, and a block of one layer."""
    with seeded("tpsgd"):
        x, y = torch.randn(40, 8, dtype=D), torch.randint(0, 5, (40,))
        head = objective.build_head(spec)
    block = Block(spec.index, {"one": layer}, head.to(D), sgd)
    return x, y, block.buffers["heads.0.feedback"][y], block


@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("loss_scale", [1.0, 0.25])
def test_the_gradient_is_the_residual_through_the_slope(loss: Any, loss_scale: float) -> None:
    """-2 (Y P - h) phi'(z) / (rows d), and of "l1" the sign of the residual."""
    layer = nn.Sequential(nn.Linear(8, 12), nn.Tanh()).to(D)
    spec, objective = make_spec((12,)), TpSgd(loss)
    x, y, target, block = make_block(layer, spec, objective)
    micro_batch = MicroBatch(x, block.forward(x, ()), y, loss_scale)
    block.backward(objective.backward_pairs(spec, block, micro_batch))
    h = micro_batch.y.detach()
    residual = 2 * (target - h) if loss == "l2" else (target - h).sign()
    delta = -loss_scale * residual * (1 - h**2) / (40 * 12)
    torch.testing.assert_close(layer[0].weight.grad, delta.T @ x, rtol=1e-12, atol=1e-16)
    gap = target - h
    expected = gap.square().mean() if loss == "l2" else gap.abs().mean()
    torch.testing.assert_close(micro_batch.loss, expected)


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_the_gradient_is_zero_at_the_target(loss: Any) -> None:
    """Unlike that of DRTP."""
    spec, objective = make_spec((12,)), TpSgd(loss)
    x, y, target, block = make_block(nn.Identity(), spec, objective)
    h = target.clone().requires_grad_()
    [(value, factor)] = objective.backward_pairs(spec, block, MicroBatch(x, h, y))
    value.backward(factor)
    assert value.item() == 0
    assert h.grad is not None
    assert not h.grad.any()


def test_it_converges_to_the_mean_target() -> None:
    """Gradient descent on uncorrelated inputs of unit variance, at lr 2."""
    spec, objective, layer = make_spec((12,)), TpSgd(), nn.Linear(8, 12, bias=False).to(D)
    x, y, target, block = make_block(layer, spec, objective)
    x = torch.linalg.qr(x).Q * 40**0.5
    block.set_lr_factor(20)
    for _ in range(60):
        micro_batch = MicroBatch(x, block.forward(x, ()), y)
        block.backward(objective.backward_pairs(spec, block, micro_batch))
        block.update()
    best = x @ torch.linalg.lstsq(x, target).solution
    torch.testing.assert_close(layer(x), best, rtol=0, atol=1e-9)


def test_targets_of_images_are_images() -> None:
    spec, objective = make_spec((3, 2, 2)), TpSgd()
    x, y, target, block = make_block(nn.Unflatten(1, (2, 2, 2)), spec, objective)
    h = torch.randn(40, 3, 2, 2, dtype=D)
    [(value, _)] = objective.backward_pairs(spec, block, MicroBatch(x, h, y))
    torch.testing.assert_close(value, (target.view_as(h) - h).square().mean())


def test_the_last_block_learns_the_true_loss() -> None:
    spec, layer = make_spec((5,), 1), nn.Linear(8, 5).to(D)
    assert TpSgd().make_head(spec) is None
    x, y = torch.randn(6, 8, dtype=D), torch.randint(0, 5, (6,))
    block = Block(1, {"head": layer}, None, sgd)
    micro_batch = MicroBatch(x, block.forward(x, ()), y)
    block.backward(TpSgd().backward_pairs(spec, block, micro_batch))
    [expected] = torch.autograd.grad(cross_entropy(layer(x), y), [layer.weight])
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, expected)


def test_defaults_are_uniform_targets_and_squares() -> None:
    objective = TpSgd()
    assert (objective.loss, objective.feedback) == ("l2", "uniform")
    *_, block = make_block(nn.Identity(), make_spec((1000,)), objective)
    targets = block.buffers["heads.0.feedback"]
    assert targets.abs().max() <= 1
    assert targets.std().item() == pytest.approx(3**-0.5, rel=0.05)
