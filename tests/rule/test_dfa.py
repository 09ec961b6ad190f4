"""The objective `dfa`: the error through fixed matrices, its identities, its delay, its angles."""

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
from tests.rule.walked import D, learnt, made

Net = list[list[nn.Module]]
Blocks = list[tuple[BlockSpec, Block]]


def deep(phi: Callable[[], nn.Module]) -> Net:
    """Return a net of three blocks: 6 - 9 - 7 - 4."""
    with seeded("net"):
        sizes = [(6, 9), (9, 7), (7, 4)]
        layers = [nn.Linear(*size).to(D) for size in sizes]
    return [[layers[0], phi()], [layers[1], phi()], [layers[2]]]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(12, 6, dtype=D), torch.randint(0, 4, (12,))


def matrices(blocks: Blocks) -> list[Tensor]:
    """Return B_k of every block that has one."""
    return [block.head.feedback for _, block in blocks if block.head is not None]


def found(blocks: Blocks) -> list[Tensor]:
    return [gradient for _, block in blocks for gradient in block.gradients()]


def wanted(net: Net, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the gradients of backpropagation."""
    whole = nn.Sequential(*(layer for part in net for layer in part))
    return list(torch.autograd.grad(cross_entropy(whole(x), y), list(whole.parameters())))


def same(one: list[Tensor], other: list[Tensor]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-16)


def test_in_a_linear_net_the_weights_downstream_make_it_backprop(
    batch: tuple[Tensor, Tensor],
) -> None:
    net, objective = deep(nn.Identity), Dfa(normalised=False)
    blocks = made(objective, net, batch[0], 4)
    weights = [net[0][0].weight, net[1][0].weight, net[2][0].weight]
    matrices(blocks)[0].copy_((weights[2] @ weights[1]).detach())
    matrices(blocks)[1].copy_(weights[2].detach())
    learnt(objective, blocks, *batch)
    same(found(blocks), wanted(net, *batch))


def test_with_the_heads_weights_the_last_hidden_block_is_backprop(
    batch: tuple[Tensor, Tensor],
) -> None:
    """Even with tanh; the block below is not."""
    net, objective = deep(nn.Tanh), Dfa(normalised=False)
    blocks = made(objective, net, batch[0], 4)
    matrices(blocks)[1].copy_(net[2][0].weight.detach())
    learnt(objective, blocks, *batch)
    mine, theirs = found(blocks), wanted(net, *batch)
    same(mine[2:], theirs[2:])
    assert not torch.allclose(mine[0], theirs[0], rtol=0.1)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_layer_learns_the_formula(normalised: bool, batch: tuple[Tensor, Tensor]) -> None:
    """delta_k = (e B_k) * phi'(z_k) / sqrt(d_k) / rows, for a share of the update."""
    (x, y), net, objective = batch, deep(nn.Tanh), Dfa(normalised=normalised)
    blocks = made(objective, net, x, 4)
    first, _, last = learnt(objective, blocks, x, y, share=0.25)
    error = last.y.detach().softmax(1) - one_hot(y, 4)
    force = error @ matrices(blocks)[0] / (9**0.5 if normalised else 1)
    delta = 0.25 / 12 * force * (1 - first.y.detach() ** 2)
    same(found(blocks)[:2], [delta.T @ x, delta.sum(0)])


def test_matrices_are_uniform_and_nobodys_weights(batch: tuple[Tensor, Tensor]) -> None:
    blocks = made(Dfa(), deep(nn.Tanh), batch[0], 4)
    assert [tuple(each.shape) for each in matrices(blocks)] == [(4, 9), (4, 7)]
    assert all(-1 <= each.min() < -0.8 and 0.8 < each.max() < 1 for each in matrices(blocks))
    assert not any(name.startswith("heads") for _, b in blocks for name in b.parameters)


def test_images_are_pushed_as_flat_outputs_are() -> None:
    with seeded("images"):
        x, y = torch.randn(5, 3, 4, 4, dtype=D), torch.randint(0, 4, (5,))
        conv, head = nn.Conv2d(3, 2, 3).to(D), nn.Linear(8, 4).to(D)
    blocks = made(Dfa(), [[conv], [nn.Flatten(), head]], x, 4)
    *_, last = learnt(Dfa(), blocks, x, y)
    error = (last.y.detach().softmax(1) - one_hot(y, 4)) / 5
    force = (error @ matrices(blocks)[0] / 8**0.5).view(5, 2, 2, 2)
    torch.testing.assert_close(conv.bias.grad, force.sum((0, 2, 3)), rtol=1e-12, atol=1e-16)
    assert any("convolutions" in told for told in Dfa().warnings([t for t, _ in blocks], 5))
    assert (
        Dfa().warnings([made(Dfa(), deep(nn.Tanh), torch.zeros(2, 6, dtype=D), 4)[0][0]], 5) == []
    )


# Angles


@pytest.mark.parametrize("phi", [nn.Identity, nn.Tanh, nn.ReLU])
def test_angles_are_those_between_the_force_and_the_true_gradient(
    phi: Callable[[], nn.Module], batch: tuple[Tensor, Tensor]
) -> None:
    """The mean over samples, against autograd through the whole net."""
    (x, y), net, objective = batch, deep(phi), Dfa(angles=True)
    blocks = made(objective, net, x, 4)
    lives = learnt(objective, blocks, x, y, share=0.5)
    outputs = [x]
    for part in net:
        outputs.append(nn.Sequential(*part)(outputs[-1]))
    true = torch.autograd.grad(cross_entropy(outputs[-1], y), outputs[1:3])
    error = outputs[-1].detach().softmax(1) - one_hot(y, 4)
    for live, matrix, gradient in zip(lives, matrices(blocks), true, strict=False):
        force = error @ matrix
        cosine = (force * gradient).sum(1) / force.norm(dim=1) / gradient.norm(dim=1)
        angle = torch.rad2deg(torch.acos(cosine)).mean()
        torch.testing.assert_close(live.metrics[ANGLE], angle, rtol=1e-12, atol=0)
    assert lives[-1].metrics == {}


def test_angles_change_nothing_that_is_learnt(batch: tuple[Tensor, Tensor]) -> None:
    learns = []
    for objective in (Dfa(), Dfa(angles=True)):
        blocks = made(objective, deep(nn.Tanh), batch[0], 4)
        learnt(objective, blocks, *batch)
        learns.append(found(blocks))
    assert all(torch.equal(*pair) for pair in zip(*learns, strict=True))


def test_the_true_gradient_has_no_angle_however_small(batch: tuple[Tensor, Tensor]) -> None:
    """Errors of 1e-12 are of confident samples, not of none."""
    net, objective = deep(nn.Identity), Dfa(angles=True)
    blocks = made(objective, net, batch[0], 4)
    matrices(blocks)[1].copy_(net[2][0].weight.detach())
    lives = learnt(objective, blocks, *batch, share=1e-12)
    assert float(lives[1].metrics[ANGLE]) < 1e-4
    matrices(blocks)[1].neg_()
    lives = learnt(objective, blocks, *batch, share=1e-12)
    assert float(lives[1].metrics[ANGLE]) > 180 - 1e-4


# What travels


def test_errors_go_to_all_blocks_and_gradients_only_where_asked() -> None:
    """With angles block by block, so that no message waits longer than its receiver lets it."""

    def rows(objective: Dfa, name: str) -> list[tuple[int, int, int]]:
        found = (r for r in objective.routes(4, "train") if r.name == name)
        return [(r.source.block, r.target.block, r.lag) for r in found]

    assert rows(Dfa(), "error") == [(3, 0, 0), (3, 1, 0), (3, 2, 0)]
    assert rows(Dfa(), GRADIENT) == []
    chain = [(1, 0, 0), (2, 1, 0), (3, 2, 0)]
    assert rows(Dfa(angles=True), "error") == rows(Dfa(angles=True), GRADIENT) == chain
    for objective in (Dfa(), Dfa(angles=True)):
        assert objective.routes(4, "predict") == forward_routes(4)


@pytest.mark.parametrize("angles", [False, True])
@pytest.mark.parametrize(("blocks", "stages"), [(3, 1), (3, 2), (5, 1), (5, 2), (5, 3), (5, 5)])
def test_no_layout_deadlocks(angles: bool, blocks: int, stages: int) -> None:
    """The plan's own proof, in the default schedule."""
    told = {"partition__blocks": blocks, "mesh__stages": stages, "objective__angles": angles}
    assert make_plan(tiny.run(objective__name="dfa", micro_batches=1, **told), stages).proof


@pytest.mark.parametrize(
    ("told", "staleness"),
    [
        ({}, [3, 2, 0]),
        ({"objective__angles": True}, [4, 2, 0]),
        ({"schedule__name": "1f1b"}, [0, 0, 0]),
        ({"schedule__name": "drained"}, [0, 0, 0]),
    ],
)
def test_the_delay_is_declared(told: dict[str, object], staleness: list[int]) -> None:
    """By default K - b updates, which nobody waits for; with the angles, that of gradients."""
    run = tiny.run(objective__name="dfa", micro_batches=1, mesh__stages=3, **told)
    assert list(make_plan(run, 3).proof.staleness) == staleness
