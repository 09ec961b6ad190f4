"""The objective `tpsgd`: targets of labels, and residuals that vanish at them."""

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


def step(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def task(outputs: tuple[int, ...], block: int = 0, blocks: int = 2) -> BlockSpec:
    return BlockSpec(block, blocks, (8,), outputs, D, 5)


def made(
    layer: nn.Module, where: BlockSpec, objective: TpSgd
) -> tuple[Tensor, Tensor, Tensor, Block]:
    """Return data, labels, their targets, and a block of one layer."""
    with seeded("tpsgd"):
        x, y = torch.randn(40, 8, dtype=D), torch.randint(0, 5, (40,))
        helper = objective.build_head(where)
    assert helper is not None
    block = Block(where.index, {"one": layer}, helper.to(D), step)
    return x, y, block.buffers["heads.0.feedback"][y], block


@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_gradient_is_the_residual_through_the_slope(loss: Any, share: float) -> None:
    """-2 (Y P - h) phi'(z) / (rows d), and of "l1" the sign of the residual."""
    layer = nn.Sequential(nn.Linear(8, 12), nn.Tanh()).to(D)
    where, objective = task((12,)), TpSgd(loss)
    x, y, target, block = made(layer, where, objective)
    live = MicroBatch(x, block.forward(x, ()), y, share)
    block.backward(objective.backward_pairs(where, block, live))
    h = live.y.detach()
    residual = 2 * (target - h) if loss == "l2" else (target - h).sign()
    delta = -share * residual * (1 - h**2) / (40 * 12)
    torch.testing.assert_close(layer[0].weight.grad, delta.T @ x, rtol=1e-12, atol=1e-16)
    gap = target - h
    wanted = gap.square().mean() if loss == "l2" else gap.abs().mean()
    torch.testing.assert_close(live.loss, wanted)


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_nothing_pulls_at_the_target(loss: Any) -> None:
    """Where DRTP would go on for ever."""
    where, objective = task((12,)), TpSgd(loss)
    x, y, target, block = made(nn.Identity(), where, objective)
    h = target.clone().requires_grad_()
    [(value, force)] = objective.backward_pairs(where, block, MicroBatch(x, h, y))
    value.backward(force)
    assert value.item() == 0
    assert h.grad is not None
    assert not h.grad.any()


def test_it_comes_to_rest_at_the_mean_target() -> None:
    """Plain descent, with inputs of unit variance that are not correlated: lr 2 is not too much."""
    where, objective, layer = task((12,)), TpSgd(), nn.Linear(8, 12, bias=False).to(D)
    x, y, target, block = made(layer, where, objective)
    x = torch.linalg.qr(x).Q * 40**0.5
    block.set_lr_factor(20)
    for _ in range(60):
        block.backward(
            objective.backward_pairs(where, block, MicroBatch(x, block.forward(x, ()), y))
        )
        block.update()
    best = x @ torch.linalg.lstsq(x, target).solution
    torch.testing.assert_close(layer(x), best, rtol=0, atol=1e-9)


def test_targets_of_images_are_images() -> None:
    where, objective = task((3, 2, 2)), TpSgd()
    x, y, target, block = made(nn.Unflatten(1, (2, 2, 2)), where, objective)
    h = torch.randn(40, 3, 2, 2, dtype=D)
    [(value, _)] = objective.backward_pairs(where, block, MicroBatch(x, h, y))
    torch.testing.assert_close(value, (target.view_as(h) - h).square().mean())


def test_the_last_block_learns_the_true_loss() -> None:
    where, layer = task((5,), 1), nn.Linear(8, 5).to(D)
    assert TpSgd().build_head(where) is None
    x, y = torch.randn(6, 8, dtype=D), torch.randint(0, 5, (6,))
    block = Block(1, {"head": layer}, None, step)
    block.backward(TpSgd().backward_pairs(where, block, MicroBatch(x, block.forward(x, ()), y)))
    [wanted] = torch.autograd.grad(cross_entropy(layer(x), y), [layer.weight])
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, wanted)


def test_defaults_are_uniform_targets_and_squares() -> None:
    objective = TpSgd()
    assert (objective.loss, objective.feedback) == ("l2", "uniform")
    *_, block = made(nn.Identity(), task((1000,)), objective)
    targets = block.buffers["heads.0.feedback"]
    assert targets.abs().max() <= 1
    assert targets.std().item() == pytest.approx(3**-0.5, rel=0.05)
