"""The objective `drtp`: the label's force on a block, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.random_feedback import MatrixKind
from dtrain.objectives.drtp import Drtp
from dtrain.rng import seeded

D = torch.float64
CLASSES = 5


def step(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def task(outputs: tuple[int, ...], block: int = 0, blocks: int = 3) -> BlockSpec:
    return BlockSpec(block, blocks, (8,), outputs, D, CLASSES)


def learnt(
    layer: nn.Module, where: BlockSpec, share: float = 1.0, **told: Any
) -> tuple[Tensor, Tensor, Tensor, MicroBatch, Block]:
    """Return data, labels, the matrix, and a block of one layer that has learnt them."""
    with seeded("drtp"):
        x, y = torch.randn(40, 8, dtype=D), torch.randint(0, CLASSES, (40,))
        objective = Drtp(**told)
        helper = objective.build_head(where)
    assert helper is not None
    block = Block(where.index, {"one": layer}, helper.to(D), step)
    live = MicroBatch(x, block.forward(x, ()), y, share)
    block.backward(objective.backward_pairs(where, block, live))
    return x, y, block.buffers[f"heads.{where.index}.feedback"], live, block


def test_a_linear_layer_learns_sums_of_inputs_by_class_through_the_matrix() -> None:
    """dW = B^T (sums of x by class) / rows: of rank C, though W is 12 x 8."""
    layer = nn.Linear(8, 12).to(D)
    x, y, matrix, _, _ = learnt(layer, task((12,)), 0.5)
    sums = torch.stack([x[y == label].sum(0) for label in range(CLASSES)])
    found = layer.weight.grad
    assert found is not None
    torch.testing.assert_close(found, 0.5 / 40 * matrix.T @ sums, rtol=0, atol=1e-15)
    assert torch.linalg.matrix_rank(found) == CLASSES


def test_the_slope_of_the_activation_is_that_of_backprop() -> None:
    """delta = (Y B) * phi'(z), as the paper has it for a layer."""
    layer = nn.Sequential(nn.Linear(8, 12), nn.Tanh()).to(D)
    x, y, matrix, live, _ = learnt(layer, task((12,)))
    delta = one_hot(y, CLASSES).to(D) @ matrix * (1 - live.y.detach() ** 2) / 40
    torch.testing.assert_close(layer[0].weight.grad, delta.T @ x, rtol=1e-13, atol=1e-16)


def test_the_loss_is_the_potential_whose_gradient_is_the_force() -> None:
    layer = nn.Sequential(nn.Linear(8, 12), nn.Tanh()).to(D)
    _, y, matrix, live, block = learnt(layer, task((12,)))
    assert live.loss is not None
    potential = (live.y.detach() * matrix[y]).sum() / 40
    torch.testing.assert_close(live.loss, potential)
    block.update()
    after = (layer(live.x) * matrix[y]).sum() / 40
    assert after < potential


def test_images_are_pushed_as_they_lie() -> None:
    layer = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1)).to(D)
    _, y, matrix, _, _ = learnt(layer, task((3, 2, 2)))
    force = matrix[y].view(40, 3, 2, 2) / 40
    torch.testing.assert_close(layer[1].bias.grad, force.sum((0, 2, 3)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", get_args(MatrixKind))
def test_every_kind_of_matrix_is_fixed(kind: str) -> None:
    *_, block = learnt(nn.Linear(8, 12).to(D), task((12,)), feedback=kind)
    assert [name for name in block.parameters if name.startswith("heads")] == []
    before = block.buffers["heads.0.feedback"].clone()
    block.update()
    assert torch.equal(block.buffers["heads.0.feedback"], before)
    assert before.shape == (CLASSES, 12)


def test_the_last_block_learns_the_true_loss() -> None:
    where, layer = task((CLASSES,), 2), nn.Linear(8, CLASSES).to(D)
    assert Drtp().build_head(where) is None
    x, y = torch.randn(6, 8, dtype=D), torch.randint(0, CLASSES, (6,))
    block = Block(2, {"head": layer}, None, step)
    block.backward(Drtp().backward_pairs(where, block, MicroBatch(x, block.forward(x, ()), y)))
    [wanted] = torch.autograd.grad(cross_entropy(layer(x), y), [layer.weight])
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, wanted)


def test_a_user_is_told_what_it_cannot_do() -> None:
    flat = [task((12,), 0), task((12,), 1), task((CLASSES,), 2)]
    [stop] = Drtp().warnings(flat, 32)
    assert "2 of 3 blocks" in stop
    images = [task((3, 4, 4), 0), task((12,), 1), task((CLASSES,), 2)]
    _, convolutions = Drtp().warnings(images, 32)
    assert "1 of 2 blocks" in convolutions
    assert "(block 0)" in convolutions
    assert Drtp().warnings([task((CLASSES,), 0, 1)], 32) == []
