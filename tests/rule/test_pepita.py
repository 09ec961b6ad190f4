"""The objective `pepita`: the rule layer by layer, the last block, the two passes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.errors import ConfigError
from dtrain.models.mlp import Dense
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.pepita import Pepita
from dtrain.planning.plan import make_plan
from dtrain.rng import seeded
from tests import tiny
from tests.refusals import refuses
from tests.rule.blocks_in_process import D, build_blocks, train_micro_batch
from tests.rule.warning_numbers import numbers_in

Blocks = list[tuple[BlockSpec, Block]]
SIZES = [(6, 9), (9, 7), (7, 4)]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(12, 6, dtype=D), torch.randint(0, 4, (12,))


def make_net(cuts: list[int], **fields: Any) -> tuple[Pepita, list[nn.Module], Blocks]:
    """Return a perceptron 6 - 9 - 7 - 4 with tanh, with `cuts` layers in its blocks."""
    with seeded("net"):
        layers = [Dense(*size, torch.tanh).to(D) for size in SIZES[:-1]]
        layers += [Dense(*SIZES[-1]).to(D)]
    remaining: Iterator[nn.Module] = iter(layers)
    parts = [[next(remaining) for _ in range(size)] for size in cuts]
    objective = Pepita(**fields)
    return objective, list(layers), build_blocks(objective, parts, torch.zeros(2, 6, dtype=D), 4)


def layer_outputs(layers: list[nn.Module], x: Tensor) -> list[Tensor]:
    """Return x and the outputs of all layers."""
    outputs = [x]
    for layer in layers:
        outputs.append(layer(outputs[-1]))
    return outputs


def output_error(scores: Tensor, y: Tensor) -> Tensor:
    return scores.softmax(1) - one_hot(y, 4)


def assert_close(tensor: Tensor | None, expected: Tensor) -> None:
    assert tensor is not None
    torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("error", ["first", "second"])
def test_with_as_many_blocks_as_layers_it_is_the_papers_rule(
    error: str, batch: tuple[Tensor, Tensor]
) -> None:
    """dW_k = (h_k - h'_k) h'_{k-1}^T, dW_L = e h'_{L-1}^T; the matrix is He-uniform."""
    x, y = batch
    objective, layers, blocks = make_net([1, 1, 1], scale=0.5, error=error)
    micro_batches = train_micro_batch(objective, blocks, x, y, loss_scale=0.25)
    matrix = blocks[0][1].head.feedback
    assert matrix.shape == (4, 6)
    assert 0.8 < matrix.abs().max() <= 1  # sqrt(6 / 6)
    with torch.no_grad():
        h = layer_outputs(layers, x)
        g = layer_outputs(layers, x + 0.5 * output_error(h[-1], y) @ matrix)
        for k, layer in enumerate(layers):
            cotangent = (
                h[k + 1] - g[k + 1]
                if k < 2
                else output_error((h if error == "first" else g)[-1], y)
            )
            assert_close(layer.weight.grad, 0.25 / 12 * cotangent.T @ g[k])
            assert_close(layer.bias.grad, 0.25 / 12 * cotangent.sum(0))
        assert_close(micro_batches[-1].loss, cross_entropy(h[-1], y))
    assert [micro_batch.loss for micro_batch in micro_batches[:-1]] == [None, None]


def test_inside_a_block_its_own_cotangent_is_backpropagated(batch: tuple[Tensor, Tensor]) -> None:
    """Two layers, then the head: the cotangent belongs to the second pre-activation."""
    (x, y), (objective, layers, blocks) = batch, make_net([2, 1], scale=0.5)
    train_micro_batch(objective, blocks, x, y)
    with torch.no_grad():
        h = layer_outputs(layers, x)
        x = x + 0.5 * output_error(h[-1], y) @ blocks[0][1].head.feedback
        cotangent = h[2] - layer_outputs(layers, x)[2]
    pre_activation = nn.functional.linear(layers[0](x), layers[1].weight, layers[1].bias)
    weight, _ = torch.autograd.grad(
        pre_activation, [layers[0].weight, layers[1].weight], cotangent / 12
    )
    assert_close(layers[0].weight.grad, weight)


@pytest.mark.parametrize("error", ["first", "second"])
def test_below_its_head_the_last_block_learns_from_the_error(
    error: str, batch: tuple[Tensor, Tensor]
) -> None:
    """With the second pass' error it is the true loss of the modulated input."""
    (x, y), (objective, layers, blocks) = batch, make_net([1, 2], scale=0.5, error=error)
    train_micro_batch(objective, blocks, x, y)
    with torch.no_grad():
        first = layer_outputs(layers, x)
        x = x + 0.5 * output_error(first[-1], y) @ blocks[0][1].head.feedback
        features = layers[0](x)
    *_, scores = layer_outputs(layers[1:], features)
    weights = [layers[1].weight, layers[2].weight]
    if error == "second":
        gradients = torch.autograd.grad(cross_entropy(scores, y), weights)
    else:
        gradients = torch.autograd.grad(scores, weights, output_error(first[-1], y) / 12)
    for weight, gradient in zip(weights, gradients, strict=True):
        assert_close(weight.grad, gradient)


def test_without_a_pre_activation_the_cotangent_belongs_to_the_output() -> None:
    with seeded("images"):
        x, y = torch.randn(5, 3, 4, 4, dtype=D), torch.randint(0, 4, (5,))
        conv = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh()).to(D)
        head = nn.Linear(8, 4).to(D)
    objective = Pepita(scale=0.5)
    blocks = build_blocks(objective, [[conv], [nn.Flatten(), head]], x, 4)
    train_micro_batch(objective, blocks, x, y)
    with torch.no_grad():
        first = conv(x)
        error = output_error(head(first.flatten(1)), y)
        x = x + (0.5 * error @ blocks[0][1].head.feedback).view_as(x)
    second = conv(x)
    (expected,) = torch.autograd.grad(second, conv[0].bias, (first - second).detach() / 5)
    assert_close(conv[0].bias.grad, expected)


def test_to_first_order_it_is_adaptive_feedback_alignment(batch: tuple[Tensor, Tensor]) -> None:
    """h - h' = -phi' * (W F e) in the first layer: the relative residual is proportional to F."""
    x, y = batch
    residuals = []
    for scale in (1e-1, 1e-2, 1e-3):
        objective, layers, blocks = make_net([1, 1, 1], scale=scale)
        first, *_ = train_micro_batch(objective, blocks, x, y)
        assert first.previous_pass is not None
        with torch.no_grad():
            modulation = (
                scale * output_error(layer_outputs(layers, x)[-1], y) @ blocks[0][1].head.feedback
            )
            first_order = -(1 - first.previous_pass.y**2) * (modulation @ layers[0].weight.T)
            residuals.append(
                float((first.previous_pass.y - first.y - first_order).norm() / first_order.norm())
            )
    assert 1e-2 < residuals[0] < 1e-1
    for large, small in pairwise(residuals):
        assert large / small == pytest.approx(10, rel=0.1)


def test_the_first_pass_leaves_no_graph(batch: tuple[Tensor, Tensor]) -> None:
    objective, _, blocks = make_net([1, 1, 1])
    for micro_batch in train_micro_batch(objective, blocks, *batch):
        assert micro_batch.previous_pass is not None
        assert micro_batch.y.requires_grad
        assert not micro_batch.previous_pass.y.requires_grad


def test_one_block_makes_one_pass_and_is_backprop(batch: tuple[Tensor, Tensor]) -> None:
    (x, y), (objective, layers, blocks) = batch, make_net([3])
    assert objective.routes(1, "train") == ()
    (micro_batch,) = train_micro_batch(objective, blocks, x, y)
    whole = list(nn.Sequential(*layers).parameters())
    expected = torch.autograd.grad(cross_entropy(nn.Sequential(*layers)(x), y), whole)
    assert micro_batch.previous_pass is None
    for parameter, gradient in zip(whole, expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize(("schedule", "delay"), [(None, 0), ("pipelined", 3)])
def test_the_delay_is_declared(schedule: str | None, delay: int) -> None:
    """Pipelined, K updates lie between the first forward and the backward."""
    changes = {"schedule__name": schedule} if schedule else {}
    run = tiny.run(objective__name="pepita", micro_batches=1, mesh__stages=3, **changes)
    assert list(make_plan(run, 3).proof.staleness) == [delay] * 3


def test_only_a_scale_above_zero_is_accepted() -> None:
    for scale in (0.0, -0.05, float("nan")):
        with refuses(ConfigError, "objective.scale-not-positive"):
            Pepita(scale=scale)


def test_many_blocks_are_warned_of() -> None:
    specs = [BlockSpec(b, 4, (6,), (6,), D, 4) for b in range(4)]
    assert Pepita().warnings(specs[:3], 8) == []
    [warning] = Pepita().warnings(specs, 8)
    assert "4" in numbers_in(warning)
