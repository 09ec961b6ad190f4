"""The objectives `dual-propagation` and `pfa`: backpropagation with other derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.errors import ConfigError
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec, DownstreamLayer
from dtrain.objectives.dual_propagation import DualPropagation
from dtrain.objectives.pfa import Feedback, Pfa
from dtrain.planning.plan import make_plan
from dtrain.rng import seeded
from tests import tiny
from tests.refusals import refuses
from tests.rule.blocks_in_process import D, build_blocks, sgd, train_micro_batch

Net = list[list[nn.Module]]
Blocks = list[tuple[BlockSpec, Block]]


def perceptron(phi: Callable[[], nn.Module] = nn.Tanh) -> Net:
    """Return three blocks: 6 - 9 - 8 - 7 - 4, the first with two layers."""
    with seeded("net"):
        a, b, c, d = (nn.Linear(*s).to(D) for s in ((6, 9), (9, 8), (8, 7), (7, 4)))
    return [[a, phi(), b, phi()], [c, phi()], [d]]


def convolutional() -> Net:
    """Return two blocks with convolutions, a norm and a linear layer."""
    with seeded("images"):
        layers = [
            [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)],
            [nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)],
        ]
    return [[layer.to(D) for layer in part] for part in layers]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(12, 6, dtype=D), torch.randint(0, 4, (12,))


def build(objective: Objective, net: Net, x: Tensor) -> Blocks:
    """Return the blocks; the specs know the layers."""
    blocks = []
    for (spec, block), part in zip(build_blocks(BARE, net, x, 4), net, strict=True):
        names = list(block.layers)
        layers = tuple(
            DownstreamLayer(n, (), 0, lambda m=m: m) for n, m in zip(names, part, strict=True)
        )
        known = BlockSpec(**{**vars(spec), "own_layers": layers})
        with seeded("heads", spec.index):
            head = objective.make_head(known)
        blocks.append((known, Block(spec.index, block.layers, head and head.to(D), sgd)))
    return blocks


BARE = DualPropagation()
"""It has no heads."""


def gradients(net: Net) -> list[Tensor]:
    return [p.grad for part in net for layer in part for p in layer.parameters()]


def backprop(net: Net, x: Tensor, y: Tensor) -> list[Tensor]:
    whole = nn.Sequential(*(layer for part in net for layer in part))
    return list(torch.autograd.grad(cross_entropy(whole(x), y), list(whole.parameters())))


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    one, two = (torch.cat([g.flatten() for g in gs]) for gs in (ours, theirs))
    return float((one - two).norm() / two.norm())


# Dual propagation


def test_the_error_of_dual_propagation_falls_with_the_square_of_beta(
    batch: tuple[Tensor, Tensor],
) -> None:
    errors = []
    for beta in (1.0, 0.1, 0.01):
        objective, net = DualPropagation(beta=beta), perceptron()
        train_micro_batch(objective, build(objective, net, batch[0]), *batch)
        errors.append(relative_error(gradients(net), backprop(net, *batch)))
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("phi", [nn.Tanh, nn.ReLU, lambda: nn.ReLU(inplace=True)])
def test_dual_propagation_sets_the_states_of_the_paper(
    phi: Callable[[], nn.Module], batch: tuple[Tensor, Tensor]
) -> None:
    """One sweep over pairs of states; the scale of the micro-batch is not in the nudge."""
    (x, y), net, beta = batch, perceptron(phi), 0.5
    objective = DualPropagation(beta=beta)
    train_micro_batch(objective, build(objective, net, x), x, y, loss_scale=0.25)
    linear = [layer for part in net for layer in part if isinstance(layer, nn.Linear)]
    sums, s = [], x
    for layer in linear:
        sums.append(layer(s).detach())
        s = phi()(sums[-1].clone())
    inputs = [x, *(phi()(a.clone()) for a in sums[:-1])]
    nudge = beta * (sums[-1].softmax(1) - one_hot(y, 4))
    difference = (sums[-1] - nudge) - (sums[-1] + nudge)
    for k in reversed(range(4)):
        ours = linear[k].weight.grad
        expected = -difference.T @ inputs[k] / (2 * beta) / 12 * 0.25
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-14)
        pull = difference @ linear[k].weight.detach() / 2
        if k:
            difference = phi()(sums[k - 1] + pull) - phi()(sums[k - 1] - pull)


# Product feedback alignment


@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_the_weights_as_feedback_make_pfa_backprop(make: Callable[[], Net]) -> None:
    net = make()
    with seeded("x"):
        x = torch.randn(12, 6, dtype=D) if make is perceptron else torch.randn(5, 2, 6, 6, dtype=D)
        y = torch.randint(0, 4, (len(x),))
    blocks = build(Pfa(), net, x)
    train_micro_batch(Pfa(), blocks, x, y)
    random, exact = gradients(net), backprop(net, x, y)
    assert relative_error(random, exact) > 0.1
    torch.testing.assert_close(random[-2:], exact[-2:], rtol=1e-12, atol=1e-15)
    for _, block in blocks:
        if isinstance(block.head, Feedback):
            for name, path in block.head.by_name().items():
                path.matrix.copy_(torch.eye(*path.matrix.shape, dtype=D))
                path.synapses.weight.data.copy_(block.modules()[name].weight)
        for parameter in block.parameters.values():
            parameter.grad = None
    train_micro_batch(Pfa(), blocks, x, y)
    torch.testing.assert_close(gradients(net), exact, rtol=1e-12, atol=1e-15)


def test_the_product_learns_what_the_weights_learn(batch: tuple[Tensor, Tensor]) -> None:
    """R^T dS = dW, so that R^T S follows W; the first layer of the model has no feedback."""
    objective, net = Pfa(expansion=3), perceptron()
    blocks = build(objective, net, batch[0])
    train_micro_batch(objective, blocks, *batch)
    names = []
    for _, block in blocks:
        assert isinstance(block.head, Feedback)
        for name, path in block.head.by_name().items():
            names.append(name)
            ours = path.matrix.T @ path.synapses.weight.grad
            weight = block.modules()[name].weight
            torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-7)  # R is cast
            assert tuple(path.matrix.shape) == (3 * len(weight), len(weight))
    assert names == ["l02", "l10", "l20"]


@pytest.mark.parametrize(
    ("objective", "model", "key"),
    [
        (
            {"name": "dual-propagation"},
            {"name": "tests.tiny:normalised"},
            "objective.module-without-difference",
        ),
        (
            {"name": "dual-propagation"},
            {"name": "tests.rule.test_other_derivatives:Branched"},
            "objective.needs-chain-of-modules",
        ),
        (
            {"name": "pfa"},
            {"name": "tests.tiny:noisy"},
            "objective.module-without-feedback",
        ),
    ],
)
def test_models_without_a_rule_are_refused_at_plan_time(
    objective: dict[str, Any], model: dict[str, Any], key: str
) -> None:
    run = tiny.run(objective=objective, model=model, partition={"blocks": 2})
    with refuses(ConfigError, key):
        make_plan(run, 1)


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        ({"name": "dual-propagation", "beta": 0.0}, "objective.beta-not-positive"),
        ({"name": "pfa", "expansion": 0}, "objective.expansion-too-small"),
    ],
)
def test_impossible_keys_are_refused(objective: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        tiny.run(objective=objective)


class Branched(nn.Module):
    """A model that is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.a, self.b = nn.Flatten(), nn.Linear(10, 3), nn.Linear(10, 3)

    def forward(self, input: Tensor) -> Tensor:
        flat = self.flat(input)
        return torch.relu(self.a(flat)) + self.b(flat)
