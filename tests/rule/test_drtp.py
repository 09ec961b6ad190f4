"""The objective `drtp`: the label as learning signal, and the limits of the method."""

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
from tests.rule.warning_numbers import numbers_in

D = torch.float64
CLASSES = 5


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def make_spec(output_shape: tuple[int, ...], block: int = 0, blocks: int = 3) -> BlockSpec:
    return BlockSpec(block, blocks, (8,), output_shape, D, CLASSES)


def train(
    layer: nn.Module, spec: BlockSpec, loss_scale: float = 1.0, **fields: Any
) -> tuple[Tensor, Tensor, Tensor, MicroBatch, Block]:
    """Return data, labels, matrix, micro-batch and a block of one layer with its gradients."""
    with seeded("drtp"):
        x, y = torch.randn(40, 8, dtype=D), torch.randint(0, CLASSES, (40,))
        objective = Drtp(**fields)
        head = objective.build_head(spec)
    block = Block(spec.index, {"one": layer}, head.to(D), sgd)
    micro_batch = MicroBatch(x, block.forward(x, ()), y, loss_scale)
    block.backward(objective.backward_pairs(spec, block, micro_batch))
    return x, y, block.buffers[f"heads.{spec.index}.feedback"], micro_batch, block


def test_a_linear_layer_learns_sums_of_inputs_by_class_through_the_matrix() -> None:
    """dW = B^T (sums of x by class) / rows: of rank C, though W is 12 x 8."""
    layer = nn.Linear(8, 12).to(D)
    x, y, matrix, _, _ = train(layer, make_spec((12,)), 0.5)
    class_sums = torch.stack([x[y == label].sum(0) for label in range(CLASSES)])
    gradient = layer.weight.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, 0.5 / 40 * matrix.T @ class_sums, rtol=0, atol=1e-15)
    assert torch.linalg.matrix_rank(gradient) == CLASSES


def test_the_slope_of_the_activation_is_that_of_backprop() -> None:
    """delta = (Y B) * phi'(z), as the paper has it for a layer."""
    layer = nn.Sequential(nn.Linear(8, 12), nn.Tanh()).to(D)
    x, y, matrix, micro_batch, _ = train(layer, make_spec((12,)))
    delta = one_hot(y, CLASSES).to(D) @ matrix * (1 - micro_batch.y.detach() ** 2) / 40
    torch.testing.assert_close(layer[0].weight.grad, delta.T @ x, rtol=1e-13, atol=1e-16)


def test_the_loss_is_the_potential_whose_gradient_is_the_cotangent() -> None:
    layer = nn.Sequential(nn.Linear(8, 12), nn.Tanh()).to(D)
    _, y, matrix, micro_batch, block = train(layer, make_spec((12,)))
    assert micro_batch.loss is not None
    potential = (micro_batch.y.detach() * matrix[y]).sum() / 40
    torch.testing.assert_close(micro_batch.loss, potential)
    block.update()
    after = (layer(micro_batch.x) * matrix[y]).sum() / 40
    assert after < potential


def test_images_learn_as_flat_outputs_do() -> None:
    layer = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1)).to(D)
    _, y, matrix, _, _ = train(layer, make_spec((3, 2, 2)))
    cotangent = matrix[y].view(40, 3, 2, 2) / 40
    torch.testing.assert_close(layer[1].bias.grad, cotangent.sum((0, 2, 3)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", get_args(MatrixKind))
def test_every_kind_of_matrix_is_fixed(kind: str) -> None:
    *_, block = train(nn.Linear(8, 12).to(D), make_spec((12,)), feedback=kind)
    assert [name for name in block.parameters if name.startswith("heads")] == []
    before = block.buffers["heads.0.feedback"].clone()
    block.update()
    assert torch.equal(block.buffers["heads.0.feedback"], before)
    assert before.shape == (CLASSES, 12)


def test_the_last_block_learns_the_true_loss() -> None:
    spec, layer = make_spec((CLASSES,), 2), nn.Linear(8, CLASSES).to(D)
    assert Drtp().make_head(spec) is None
    x, y = torch.randn(6, 8, dtype=D), torch.randint(0, CLASSES, (6,))
    block = Block(2, {"head": layer}, None, sgd)
    micro_batch = MicroBatch(x, block.forward(x, ()), y)
    block.backward(Drtp().backward_pairs(spec, block, micro_batch))
    [expected] = torch.autograd.grad(cross_entropy(layer(x), y), [layer.weight])
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, expected)


def test_the_run_warns_of_its_limits() -> None:
    """2 of 3 blocks have no error term; 1 of 2 outputs, that of block 0, is an image."""
    flat = [make_spec((12,), 0), make_spec((12,), 1), make_spec((CLASSES,), 2)]
    [no_error] = Drtp().warnings(flat, 32)
    assert numbers_in(no_error) == {"2", "3"}
    images = [make_spec((3, 4, 4), 0), make_spec((12,), 1), make_spec((CLASSES,), 2)]
    _, convolutions = Drtp().warnings(images, 32)
    assert numbers_in(convolutions) >= {"1", "2", "0"}
    assert Drtp().warnings([make_spec((CLASSES,), 0, 1)], 32) == []
