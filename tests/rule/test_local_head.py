"""The objective `local-head`: its networks, and the laws of decoupled learning on a ResNet."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import DtrainError
from dtrain.models import load_model
from dtrain.models.layers import LayerStack
from dtrain.models.shape_inference import LayerSpec, infer_layers, profile_module
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.local_head import LocalHead
from dtrain.planning.block_costs import BlockCosts
from dtrain.rng import seeded

D = torch.float64
DGL = LocalHead(head="dgl", norm="batch")
ROUTES = [
    LocalHead("greedy"),
    DGL,
    LocalHead("dgl", "group", 2),
    LocalHead("dgl", "none", hidden=0),
]
every_head = pytest.mark.parametrize("objective", ROUTES, ids=lambda o: f"{o.head}-{o.norm}")


def task(outputs: tuple[int, ...], block: int = 0, blocks: int = 3, classes: int = 10) -> BlockSpec:
    return BlockSpec(block, blocks, (3, 8, 8), outputs, D, classes)


def head(objective: LocalHead, outputs: tuple[int, ...]) -> nn.Module:
    with seeded("head"):
        made = objective.build_head(task(outputs))
    assert made is not None
    return made.to(D)


def step(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# The networks


def test_a_greedy_head_is_the_mean_over_pixels_and_one_linear_layer() -> None:
    made = head(LocalHead(), (6, 5, 4))
    x = torch.randn(7, 6, 5, 4, dtype=D)
    weight, bias = made.parameters()
    assert (weight.shape, bias.shape) == ((10, 6), (10,))
    torch.testing.assert_close(made(x), x.flatten(2).mean(2) @ weight.T + bias)


@pytest.mark.parametrize(("size", "pooled", "final"), [(16, 4, 2), (9, 3, 2), (8, 2, 2), (4, 1, 1)])
def test_a_dgl_head_is_the_papers_network(size: int, pooled: int, final: int) -> None:
    """Written out with plain functions; 4 c units where there are 2 x 2 pixels."""
    made = head(DGL, (6, size, size))
    x = torch.randn(7, 6, size, size, dtype=D)
    found, weights = made(x), list(made.parameters())
    wide = 6 * final**2
    assert [tuple(w.shape) for w in weights if w.dim() > 1] == [
        *[(6, 6, 1, 1)] * 3,
        *[(wide, wide)] * 3,
        (10, wide),
    ]

    def normed(y: Tensor) -> Tensor:
        dims = [0, *range(2, y.dim())]
        mean, variance = y.mean(dims, True), y.var(dims, unbiased=False, keepdim=True)
        scale, shift = (weights.pop(0).view(1, -1, *[1] * (y.dim() - 2)) for _ in range(2))
        return ((y - mean) / (variance + 1e-5).sqrt() * scale + shift).relu()

    x = functional.adaptive_avg_pool2d(x, pooled)
    for _ in range(3):
        x = normed(functional.conv2d(x, weights.pop(0)))
    x = functional.adaptive_avg_pool2d(x, final).flatten(1)
    for _ in range(3):
        x = normed(functional.linear(x, weights.pop(0), weights.pop(0)))
    torch.testing.assert_close(found, functional.linear(x, *weights))


@pytest.mark.parametrize("outputs", [(12,), (3, 4)])
def test_outputs_that_are_no_images_are_flattened(outputs: tuple[int, ...]) -> None:
    x = torch.randn(5, *outputs, dtype=D)
    weight, bias = (greedy := head(LocalHead(), outputs)).parameters()
    torch.testing.assert_close(greedy(x), x.flatten(1) @ weight.T + bias)
    layers = [each for each in head(DGL, outputs).modules() if isinstance(each, nn.Linear)]
    assert [(each.in_features, each.out_features) for each in layers] == [(12, 12)] * 3 + [(12, 10)]


def test_multiply_adds_of_a_head_are_counted_by_hand() -> None:
    """16 channels of 32 x 32: 8 x 8 pixels for three 1x1 convolutions, then 64 units."""
    spec = profile_module(head(DGL, (16, 32, 32)), (16, 32, 32), D, device="cpu")
    wanted = 3 * 16 * 16 * 8 * 8 + 3 * 64 * 64 + 64 * 10
    assert (spec.forward_macs, spec.weight_gradient_macs, spec.input_gradient_macs) == (wanted,) * 3
    assert spec.couples_samples


def test_a_cut_pays_for_the_head_that_stands_on_it() -> None:
    net = load_model("resnet", {"depth": 8}, Path(), (3, 32, 32), 10)
    specs = infer_layers(net, (3, 32, 32), torch.float32)
    about = BlockSpec.from_data((3, 32, 32), 10)
    alone, with_head, greedy, dgl = (
        BlockCosts(specs, objective, net, about)
        for objective in (
            *(OBJECTIVES["backprop"](), OBJECTIVES["local-head"]()),
            *(LocalHead("greedy"), DGL),
        )
    )
    assert with_head.flops(0, 2) == greedy.flops(0, 2)
    assert with_head.flops(0, 5) == alone.flops(0, 5)
    assert dgl.parameters(0, 2) - alone.parameters(0, 2) == (
        3 * (16 * 16 + 32) + 3 * (64 * 64 + 64 + 128) + 650
    )


def test_wrong_heads_are_refused() -> None:
    with pytest.raises(DtrainError, match="hidden = -1"):
        LocalHead(hidden=-1)
    with pytest.raises(DtrainError, match=r"groups = 8: 12 channels .* 1, 2, 3, 4, 6, 12"):
        head(LocalHead("dgl", "group"), (12, 4, 4))


# The laws, block by block


@cache
def small() -> tuple[LayerStack, tuple[LayerSpec, ...]]:
    net = load_model("resnet", {"depth": 8, "width": 4}, Path(), (3, 8, 8), 3)
    return net, infer_layers(net, (3, 8, 8), D)


def blocks(objective: LocalHead, cuts: tuple[int, ...] = (2, 3)) -> list[tuple[BlockSpec, Block]]:
    """Return a ResNet-8 of width 4 with its heads, cut at layers, in float64."""
    net, specs = small()
    made = []
    for index, (i, j) in enumerate(itertools.pairwise((0, *cuts, len(specs)))):
        where = BlockSpec(
            index, len(cuts) + 1, specs[i].input_shape, specs[j - 1].output_shape, D, 3
        )
        with seeded("heads", index):
            helper = objective.build_head(where)
        layers = net.build(range(i, j), 1, D)
        made.append((where, Block(index, layers, None if helper is None else helper.to(D), step)))
    return made


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(6, 3, 8, 8, dtype=D), torch.randint(0, 3, (6,))


@every_head
def test_the_loss_of_a_block_moves_no_other(
    objective: LocalHead, batch: tuple[Tensor, Tensor]
) -> None:
    """Law 7, exactly: every block in turn is the only one that learns."""
    x, y = batch
    made = blocks(objective)
    for own, (where, learner) in enumerate(made):
        x = x.detach()
        live = MicroBatch(x, learner.forward(x, ()), y)
        learner.backward(objective.backward_pairs(where, learner, live))
        for other, (_, each) in enumerate(made):
            assert all((p.grad is not None) == (own == other) for p in each.trainable_parameters)
            for parameter in each.trainable_parameters:
                parameter.grad = None
        x = live.y


@every_head
def test_one_backward_of_the_sum_is_the_blocks_own(
    objective: LocalHead, batch: tuple[Tensor, Tensor]
) -> None:
    """Bit for bit: the losses of all blocks, detached from each other, added up or learnt apart."""
    x, y = batch
    apart, together = blocks(objective), blocks(objective)
    losses = []
    for (where, one), (_, same) in zip(apart, together, strict=True):
        x = x.detach()
        live = MicroBatch(x, one.forward(x, ()), y)
        one.backward(objective.backward_pairs(where, one, live))
        out = same.forward(x, ())
        losses.append(cross_entropy(out if same.head is None else same.head(out), y))
        x = live.y
    torch.stack(losses).sum().backward()
    for (_, one), (_, same) in zip(apart, together, strict=True):
        for ours, theirs in zip(one.gradients(), same.gradients(), strict=True):
            assert torch.equal(ours, theirs)


@every_head
def test_one_block_is_ordinary_backprop(objective: LocalHead, batch: tuple[Tensor, Tensor]) -> None:
    """Law 4 on a ResNet, bit for bit, over several updates."""
    x, y = batch
    (where, ours), (_, theirs) = *blocks(objective, ()), *blocks(objective, ())
    plain = nn.Sequential(*theirs.layers.values())
    optimizer = step(plain.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
        ours.backward(objective.backward_pairs(where, ours, MicroBatch(x, ours.forward(x, ()), y)))
        ours.update()
    for mine, wanted in zip(ours.trainable_parameters, plain.parameters(), strict=True):
        assert torch.equal(mine, wanted)
