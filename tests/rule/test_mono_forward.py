"""The objective `mono-forward`: gradients in closed form, the vote, pooled images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import DtrainError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.pooling import make_pool, pooled_size, width
from dtrain.objectives.mono_forward import MonoForward
from dtrain.rng import seeded

D = torch.float64


def step(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]


def task(outputs: tuple[int, ...], block: int = 0, blocks: int = 2) -> BlockSpec:
    return BlockSpec(block, blocks, (4,), outputs, D, 3)


def pulled(where: BlockSpec, layer: nn.Module, x: Tensor, y: Tensor, share: float = 1) -> Block:
    """Return a block of one layer that has learnt one micro-batch."""
    helper = MonoForward().build_head(where)
    block = Block(where.index, {"one": layer}, None if helper is None else helper.to(D), step)
    live = MicroBatch(x, block.forward(x, ()), y, share)
    block.backward(MonoForward().backward_pairs(where, block, live))
    return block


def test_gradients_are_the_closed_form() -> None:
    """delta = (softmax(a M^T) - Y) / rows, dM = delta^T a, dW = ((delta M) * phi')^T x."""
    with seeded("mono-forward"):
        x, y = torch.randn(6, 4, dtype=D), torch.randint(0, 3, (6,))
        layer = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).to(D)
        block = pulled(task((5,)), layer, x, y, 0.25)
    a, m = layer(x).detach(), block.parameters["heads.0.1.weight"]
    delta = 0.25 * ((a @ m.T).softmax(1) - one_hot(y, 3)) / 6
    torch.testing.assert_close(m.grad, delta.T @ a, rtol=1e-14, atol=1e-15)
    wanted = ((delta @ m) * (1 - a**2)).T @ x
    torch.testing.assert_close(block.parameters["one.0.weight"].grad, wanted, rtol=1e-13, atol=0)


def test_one_block_is_ordinary_backprop() -> None:
    with seeded("mono-forward"):
        x, y, layer = torch.randn(6, 4, dtype=D), torch.randint(0, 3, (6,)), nn.Linear(4, 3).to(D)
    block = pulled(task((3,), 0, 1), layer, x, y)
    found = [each.grad for each in block.trainable_parameters]
    wanted = torch.autograd.grad(cross_entropy(layer(x), y), block.trainable_parameters)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True) if f is not None)
    assert None not in found


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
def test_images_are_averaged_to_the_largest_square_that_the_limit_has_room_for(
    shape: tuple[int, ...], limit: int, size: tuple[int, int] | None
) -> None:
    assert pooled_size(shape, limit) == size
    x = torch.randn(2, *shape, dtype=D)
    wanted = (x if size is None else adaptive_avg_pool2d(x, size)).flatten(1)
    assert torch.equal(make_pool(shape, limit)(x), wanted)
    assert wanted.shape[1] == width(shape, limit)


def test_heads_are_as_wide_as_the_pooled_image() -> None:
    head = MonoForward(features=70).build_head(task((16, 8, 8)))
    assert head is not None
    assert [each.shape for each in head.parameters()] == [(3, 16 * 2 * 2)]
    assert head(torch.randn(5, 16, 8, 8)).shape == (5, 3)


def test_no_features_are_refused() -> None:
    with pytest.raises(DtrainError, match="features = 0: give at least 1"):
        MonoForward(features=0)
