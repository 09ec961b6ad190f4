"""The objective `dfa`: feedback of the error, its identities, delay and angles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.objectives.base import GRADIENT, forward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.dfa import ANGLE, Dfa
from dtrain.planning.plan import make_plan
from dtrain.rng import seeded
from tests import tiny
from tests.rule.blocks_in_process import D, build_blocks, train_micro_batch

Net = list[list[nn.Module]]
Blocks = list[tuple[BlockSpec, Block]]


def make_net(phi: Callable[[], nn.Module]) -> Net:
    """Return the layers of three blocks: 6 - 9 - 7 - 4."""
    with seeded("net"):
        sizes = [(6, 9), (9, 7), (7, 4)]
        layers = [nn.Linear(*size).to(D) for size in sizes]
    return [[layers[0], phi()], [layers[1], phi()], [layers[2]]]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(12, 6, dtype=D), torch.randint(0, 4, (12,))


def matrices(blocks: Blocks) -> list[Tensor]:
    """Return the matrices B_k of the earlier blocks."""
    return [block.head.feedback for _, block in blocks if block.head is not None]


def all_gradients(blocks: Blocks) -> list[Tensor]:
    return [gradient for _, block in blocks for gradient in block.gradients()]


def backprop_gradients(net: Net, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the gradients of backpropagation."""
    whole = nn.Sequential(*(layer for part in net for layer in part))
    return list(torch.autograd.grad(cross_entropy(whole(x), y), list(whole.parameters())))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-16)


def test_in_a_linear_net_the_weights_downstream_make_it_backprop(
    batch: tuple[Tensor, Tensor],
) -> None:
    net, objective = make_net(nn.Identity), Dfa(normalised=False)
    blocks = build_blocks(objective, net, batch[0], 4)
    weights = [net[0][0].weight, net[1][0].weight, net[2][0].weight]
    matrices(blocks)[0].copy_((weights[2] @ weights[1]).detach())
    matrices(blocks)[1].copy_(weights[2].detach())
    train_micro_batch(objective, blocks, *batch)
    assert_same(all_gradients(blocks), backprop_gradients(net, *batch))


def test_with_the_heads_weights_the_last_hidden_block_is_backprop(
    batch: tuple[Tensor, Tensor],
) -> None:
    """Even with tanh; the block before it is not."""
    net, objective = make_net(nn.Tanh), Dfa(normalised=False)
    blocks = build_blocks(objective, net, batch[0], 4)
    matrices(blocks)[1].copy_(net[2][0].weight.detach())
    train_micro_batch(objective, blocks, *batch)
    mine, theirs = all_gradients(blocks), backprop_gradients(net, *batch)
    assert_same(mine[2:], theirs[2:])
    assert not torch.allclose(mine[0], theirs[0], rtol=0.1)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_layer_learns_the_formula(normalised: bool, batch: tuple[Tensor, Tensor]) -> None:
    """delta_k = (e B_k) * phi'(z_k) / sqrt(d_k) / rows, times `loss_scale`."""
    (x, y), net, objective = batch, make_net(nn.Tanh), Dfa(normalised=normalised)
    blocks = build_blocks(objective, net, x, 4)
    first, _, last = train_micro_batch(objective, blocks, x, y, loss_scale=0.25)
    error = last.y.detach().softmax(1) - one_hot(y, 4)
    cotangent = error @ matrices(blocks)[0] / (9**0.5 if normalised else 1)
    delta = 0.25 / 12 * cotangent * (1 - first.y.detach() ** 2)
    assert_same(all_gradients(blocks)[:2], [delta.T @ x, delta.sum(0)])


def test_matrices_are_uniform_and_no_parameters(batch: tuple[Tensor, Tensor]) -> None:
    blocks = build_blocks(Dfa(), make_net(nn.Tanh), batch[0], 4)
    assert [tuple(matrix.shape) for matrix in matrices(blocks)] == [(4, 9), (4, 7)]
    assert all(-1 <= m.min() < -0.8 and 0.8 < m.max() < 1 for m in matrices(blocks))
    assert not any(name.startswith("heads") for _, b in blocks for name in b.parameters)


def test_images_learn_as_flat_outputs_do() -> None:
    with seeded("images"):
        x, y = torch.randn(5, 3, 4, 4, dtype=D), torch.randint(0, 4, (5,))
        conv, head = nn.Conv2d(3, 2, 3).to(D), nn.Linear(8, 4).to(D)
    blocks = build_blocks(Dfa(), [[conv], [nn.Flatten(), head]], x, 4)
    *_, last = train_micro_batch(Dfa(), blocks, x, y)
    error = (last.y.detach().softmax(1) - one_hot(y, 4)) / 5
    cotangent = (error @ matrices(blocks)[0] / 8**0.5).view(5, 2, 2, 2)
    torch.testing.assert_close(conv.bias.grad, cotangent.sum((0, 2, 3)), rtol=1e-12, atol=1e-16)
    assert len(Dfa().warnings([spec for spec, _ in blocks], 5)) == 1
    flat = build_blocks(Dfa(), make_net(nn.Tanh), torch.zeros(2, 6, dtype=D), 4)
    assert Dfa().warnings([spec for spec, _ in flat], 5) == []


# Angles


@pytest.mark.parametrize("phi", [nn.Identity, nn.Tanh, nn.ReLU])
def test_angles_are_those_between_the_cotangent_and_the_true_gradient(
    phi: Callable[[], nn.Module], batch: tuple[Tensor, Tensor]
) -> None:
    """The mean over samples, against autograd through the whole model."""
    (x, y), net, objective = batch, make_net(phi), Dfa(angles=True)
    blocks = build_blocks(objective, net, x, 4)
    micro_batches = train_micro_batch(objective, blocks, x, y, loss_scale=0.5)
    outputs = [x]
    for part in net:
        outputs.append(nn.Sequential(*part)(outputs[-1]))
    true = torch.autograd.grad(cross_entropy(outputs[-1], y), outputs[1:3])
    error = outputs[-1].detach().softmax(1) - one_hot(y, 4)
    for micro_batch, matrix, gradient in zip(micro_batches, matrices(blocks), true, strict=False):
        cotangent = error @ matrix
        cosine = (cotangent * gradient).sum(1) / cotangent.norm(dim=1) / gradient.norm(dim=1)
        angle = torch.rad2deg(torch.acos(cosine)).mean()
        torch.testing.assert_close(micro_batch.metrics[ANGLE], angle, rtol=1e-12, atol=0)
    assert micro_batches[-1].metrics == {}


def test_angles_change_nothing_that_is_learnt(batch: tuple[Tensor, Tensor]) -> None:
    gradients = []
    for objective in (Dfa(), Dfa(angles=True)):
        blocks = build_blocks(objective, make_net(nn.Tanh), batch[0], 4)
        train_micro_batch(objective, blocks, *batch)
        gradients.append(all_gradients(blocks))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_the_true_gradient_has_no_angle_however_small(batch: tuple[Tensor, Tensor]) -> None:
    """Errors of 1e-12 belong to confident samples; they are not zero."""
    net, objective = make_net(nn.Identity), Dfa(angles=True)
    blocks = build_blocks(objective, net, batch[0], 4)
    matrices(blocks)[1].copy_(net[2][0].weight.detach())
    micro_batches = train_micro_batch(objective, blocks, *batch, loss_scale=1e-12)
    assert float(micro_batches[1].metrics[ANGLE]) < 1e-4
    matrices(blocks)[1].neg_()
    micro_batches = train_micro_batch(objective, blocks, *batch, loss_scale=1e-12)
    assert float(micro_batches[1].metrics[ANGLE]) > 180 - 1e-4


# Messages


def test_errors_go_to_all_blocks_and_gradients_only_where_asked() -> None:
    """With angles block by block, so that no message waits for another at its receiver."""

    def routes(objective: Dfa, name: str) -> list[tuple[int, int, int]]:
        named = (route for route in objective.routes(4, "train") if route.name == name)
        return [(route.source.block, route.target.block, route.lag) for route in named]

    assert routes(Dfa(), "error") == [(3, 0, 0), (3, 1, 0), (3, 2, 0)]
    assert routes(Dfa(), GRADIENT) == []
    chain = [(1, 0, 0), (2, 1, 0), (3, 2, 0)]
    assert routes(Dfa(angles=True), "error") == routes(Dfa(angles=True), GRADIENT) == chain
    for objective in (Dfa(), Dfa(angles=True)):
        assert objective.routes(4, "predict") == forward_routes(4)


@pytest.mark.parametrize("angles", [False, True])
@pytest.mark.parametrize(("blocks", "stages"), [(3, 1), (3, 2), (5, 1), (5, 2), (5, 3), (5, 5)])
def test_no_layout_deadlocks(angles: bool, blocks: int, stages: int) -> None:
    """The plan's own proof, in the default schedule."""
    changes = {"partition__blocks": blocks, "mesh__stages": stages, "objective__angles": angles}
    assert make_plan(tiny.run(objective__name="dfa", micro_batches=1, **changes), stages).proof


@pytest.mark.parametrize(
    ("changes", "staleness"),
    [
        ({}, [3, 2, 0]),
        ({"objective__angles": True}, [4, 2, 0]),
        ({"schedule__name": "1f1b"}, [0, 0, 0]),
        ({"schedule__name": "drained"}, [0, 0, 0]),
    ],
)
def test_the_delay_is_declared(changes: dict[str, object], staleness: list[int]) -> None:
    """By default K - b updates without waiting; with angles that of gradients."""
    run = tiny.run(objective__name="dfa", micro_batches=1, mesh__stages=3, **changes)
    assert list(make_plan(run, 3).proof.staleness) == staleness
