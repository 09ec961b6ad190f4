"""The objective `pepita`: the rule layer by layer, what its last block learns, its two passes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.errors import DtrainError
from dtrain.models.mlp import Dense
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.pepita import Pepita
from dtrain.planning.plan import make_plan
from dtrain.rng import seeded
from tests import tiny
from tests.rule.walked import D, learnt, made

Blocks = list[tuple[BlockSpec, Block]]
SIZES = [(6, 9), (9, 7), (7, 4)]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(12, 6, dtype=D), torch.randint(0, 4, (12,))


def deep(cuts: list[int], **told: Any) -> tuple[Pepita, list[nn.Module], Blocks]:
    """Return a perceptron 6 - 9 - 7 - 4 with tanh whose blocks have so many layers."""
    with seeded("net"):
        layers = [Dense(*size, torch.tanh).to(D) for size in SIZES[:-1]]
        layers += [Dense(*SIZES[-1]).to(D)]
    left: Iterator[nn.Module] = iter(layers)
    parts = [[next(left) for _ in range(size)] for size in cuts]
    objective = Pepita(**told)
    return objective, list(layers), made(objective, parts, torch.zeros(2, 6, dtype=D), 4)


def passed(layers: list[nn.Module], x: Tensor) -> list[Tensor]:
    """Return x and what every layer makes of it."""
    found = [x]
    for layer in layers:
        found.append(layer(found[-1]))
    return found


def missed(scores: Tensor, y: Tensor) -> Tensor:
    return scores.softmax(1) - one_hot(y, 4)


def close(one: Tensor | None, other: Tensor) -> None:
    assert one is not None
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("error", ["first", "second"])
def test_with_as_many_blocks_as_layers_it_is_the_papers_rule(
    error: str, batch: tuple[Tensor, Tensor]
) -> None:
    """dW_k = (h_k - h'_k) h'_{k-1}^T, dW_L = e h'_{L-1}^T; the matrix is He-uniform."""
    x, y = batch
    objective, layers, blocks = deep([1, 1, 1], scale=0.5, error=error)
    lives = learnt(objective, blocks, x, y, share=0.25)
    matrix = blocks[0][1].head.feedback
    assert matrix.shape == (4, 6)
    assert 0.8 < matrix.abs().max() <= 1  # sqrt(6 / 6)
    with torch.no_grad():
        h = passed(layers, x)
        g = passed(layers, x + 0.5 * missed(h[-1], y) @ matrix)
        for k, layer in enumerate(layers):
            step = h[k + 1] - g[k + 1] if k < 2 else missed((h if error == "first" else g)[-1], y)
            close(layer.weight.grad, 0.25 / 12 * step.T @ g[k])
            close(layer.bias.grad, 0.25 / 12 * step.sum(0))
        close(lives[-1].loss, cross_entropy(h[-1], y))
    assert [live.loss for live in lives[:-1]] == [None, None]


def test_inside_a_block_its_own_force_is_backpropagated(batch: tuple[Tensor, Tensor]) -> None:
    """Two layers, then the head: the force is on the second one's sums."""
    (x, y), (objective, layers, blocks) = batch, deep([2, 1], scale=0.5)
    learnt(objective, blocks, x, y)
    with torch.no_grad():
        h = passed(layers, x)
        x = x + 0.5 * missed(h[-1], y) @ blocks[0][1].head.feedback
        force = h[2] - passed(layers, x)[2]
    sums = nn.functional.linear(layers[0](x), layers[1].weight, layers[1].bias)
    weight, _ = torch.autograd.grad(sums, [layers[0].weight, layers[1].weight], force / 12)
    close(layers[0].weight.grad, weight)


@pytest.mark.parametrize("error", ["first", "second"])
def test_below_its_head_the_last_block_learns_from_the_error(
    error: str, batch: tuple[Tensor, Tensor]
) -> None:
    """With the second pass' error it is the true loss of the modulated input."""
    (x, y), (objective, layers, blocks) = batch, deep([1, 2], scale=0.5, error=error)
    learnt(objective, blocks, x, y)
    with torch.no_grad():
        first = passed(layers, x)
        x = x + 0.5 * missed(first[-1], y) @ blocks[0][1].head.feedback
        enters = layers[0](x)
    *_, scores = passed(layers[1:], enters)
    wanted = [layers[1].weight, layers[2].weight]
    if error == "second":
        told = torch.autograd.grad(cross_entropy(scores, y), wanted)
    else:
        told = torch.autograd.grad(scores, wanted, missed(first[-1], y) / 12)
    for weight, gradient in zip(wanted, told, strict=True):
        close(weight.grad, gradient)


def test_a_layer_without_sums_is_pulled_at_its_output() -> None:
    with seeded("images"):
        x, y = torch.randn(5, 3, 4, 4, dtype=D), torch.randint(0, 4, (5,))
        conv = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh()).to(D)
        head = nn.Linear(8, 4).to(D)
    objective = Pepita(scale=0.5)
    blocks = made(objective, [[conv], [nn.Flatten(), head]], x, 4)
    learnt(objective, blocks, x, y)
    with torch.no_grad():
        first = conv(x)
        error = missed(head(first.flatten(1)), y)
        x = x + (0.5 * error @ blocks[0][1].head.feedback).view_as(x)
    second = conv(x)
    (wanted,) = torch.autograd.grad(second, conv[0].bias, (first - second).detach() / 5)
    close(conv[0].bias.grad, wanted)


def test_to_first_order_it_is_adaptive_feedback_alignment(batch: tuple[Tensor, Tensor]) -> None:
    """h - h' = -phi' * (W F e) in the first layer: what is left is proportional to F."""
    x, y = batch
    residuals = []
    for scale in (1e-1, 1e-2, 1e-3):
        objective, layers, blocks = deep([1, 1, 1], scale=scale)
        first, *_ = learnt(objective, blocks, x, y)
        assert first.previous_pass is not None
        with torch.no_grad():
            added = scale * missed(passed(layers, x)[-1], y) @ blocks[0][1].head.feedback
            linear = -(1 - first.previous_pass.y**2) * (added @ layers[0].weight.T)
            residuals.append(
                float((first.previous_pass.y - first.y - linear).norm() / linear.norm())
            )
    assert 1e-2 < residuals[0] < 1e-1
    for large, small in pairwise(residuals):
        assert large / small == pytest.approx(10, rel=0.1)


def test_the_first_pass_leaves_no_graph(batch: tuple[Tensor, Tensor]) -> None:
    objective, _, blocks = deep([1, 1, 1])
    for live in learnt(objective, blocks, *batch):
        assert live.previous_pass is not None
        assert live.y.requires_grad
        assert not live.previous_pass.y.requires_grad


def test_one_block_makes_one_pass_and_is_backprop(batch: tuple[Tensor, Tensor]) -> None:
    (x, y), (objective, layers, blocks) = batch, deep([3])
    assert objective.routes(1, "train") == ()
    (live,) = learnt(objective, blocks, x, y)
    whole = list(nn.Sequential(*layers).parameters())
    wanted = torch.autograd.grad(cross_entropy(nn.Sequential(*layers)(x), y), whole)
    assert live.previous_pass is None
    for parameter, gradient in zip(whole, wanted, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize(("schedule", "late"), [(None, 0), ("pipelined", 3)])
def test_the_delay_is_declared(schedule: str | None, late: int) -> None:
    """Pipelined, both passes and K updates lie between a forward and its learning."""
    named = {"schedule__name": schedule} if schedule else {}
    run = tiny.run(objective__name="pepita", micro_batches=1, mesh__stages=3, **named)
    assert list(make_plan(run, 3).proof.staleness) == [late] * 3


def test_only_a_scale_above_zero_is_taken() -> None:
    for scale in (0.0, -0.05, float("nan")):
        with pytest.raises(DtrainError, match=r"\[objective\] scale"):
            Pepita(scale=scale)


def test_many_blocks_are_told() -> None:
    tasks = [BlockSpec(b, 4, (6,), (6,), D, 4) for b in range(4)]
    assert Pepita().warnings(tasks[:3], 8) == []
    assert "4 blocks" in Pepita().warnings(tasks, 8)[0]
