"""The objective `mono-forward`: gradients in closed form, the vote, pooled images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.pooling import make_pool, pooled_size, width
from dtrain.objectives.mono_forward import MonoForward
from dtrain.rng import seeded
from tests.refusals import refuses

D = torch.float64


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]


def make_spec(output_shape: tuple[int, ...], block: int = 0, blocks: int = 2) -> BlockSpec:
    return BlockSpec(block, blocks, (4,), output_shape, D, 3)


def trained_block(
    spec: BlockSpec, layer: nn.Module, x: Tensor, y: Tensor, loss_scale: float = 1
) -> Block:
    """Return a block of one layer, with the gradients of one micro-batch."""
    head = MonoForward().make_head(spec)
    block = Block(spec.index, {"one": layer}, head and head.to(D), sgd)
    micro_batch = MicroBatch(x, block.forward(x, ()), y, loss_scale)
    block.backward(MonoForward().backward_pairs(spec, block, micro_batch))
    return block


def test_gradients_are_the_closed_form() -> None:
    """delta = (softmax(a M^T) - Y) / rows, dM = delta^T a, dW = ((delta M) * phi')^T x."""
    with seeded("mono-forward"):
        x, y = torch.randn(6, 4, dtype=D), torch.randint(0, 3, (6,))
        layer = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).to(D)
        block = trained_block(make_spec((5,)), layer, x, y, 0.25)
    a, m = layer(x).detach(), block.parameters["heads.0.1.weight"]
    delta = 0.25 * ((a @ m.T).softmax(1) - one_hot(y, 3)) / 6
    torch.testing.assert_close(m.grad, delta.T @ a, rtol=1e-14, atol=1e-15)
    expected = ((delta @ m) * (1 - a**2)).T @ x
    torch.testing.assert_close(block.parameters["one.0.weight"].grad, expected, rtol=1e-13, atol=0)


def test_one_block_is_ordinary_backprop() -> None:
    with seeded("mono-forward"):
        x, y, layer = torch.randn(6, 4, dtype=D), torch.randint(0, 3, (6,)), nn.Linear(4, 3).to(D)
    block = trained_block(make_spec((3,), 0, 1), layer, x, y)
    expected = torch.autograd.grad(cross_entropy(layer(x), y), block.trainable_parameters)
    assert all(map(torch.equal, block.gradients(), expected))


def test_the_prediction_is_the_last_blocks_unless_a_vote_is_asked_for() -> None:
    assert not MonoForward().predicts_by_vote
    assert MonoForward(prediction="vote").predicts_by_vote


@pytest.mark.parametrize(
    ("shape", "limit", "size"),
    [
        ((32, 16, 16), 2048, (8, 8)),  # 32 * 8 * 8 = 2048
        ((32, 8, 8), 2048, None),
        ((48, 16, 16), 2048, (6, 6)),  # 48 * 36 = 1728; 7 * 7 would be 2352
        ((4096, 4, 4), 2048, (1, 1)),
        ((8, 4, 400), 2048, (4, 16)),
        ((5000,), 2048, None),
        ((90, 70), 2048, None),
    ],
)
def test_images_are_averaged_to_the_largest_square_within_the_limit(
    shape: tuple[int, ...], limit: int, size: tuple[int, int] | None
) -> None:
    assert pooled_size(shape, limit) == size
    x = torch.randn(2, *shape, dtype=D)
    expected = (x if size is None else adaptive_avg_pool2d(x, size)).flatten(1)
    assert torch.equal(make_pool(shape, limit)(x), expected)
    assert expected.shape[1] == width(shape, limit)


def test_heads_are_as_wide_as_the_pooled_image() -> None:
    head = MonoForward(features=70).build_head(make_spec((16, 8, 8)))
    assert [parameter.shape for parameter in head.parameters()] == [(3, 16 * 2 * 2)]
    assert head(torch.randn(5, 16, 8, 8)).shape == (5, 3)


def test_no_features_are_refused() -> None:
    with refuses(ConfigError, "objective.features-too-small"):
        MonoForward(features=0)
