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
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.layers import LayerStack
from dtrain.models.shape_inference import LayerProfile, infer_layers, profile_module
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.local_head import LocalHead
from dtrain.planning.block_costs import BlockCosts
from dtrain.rng import seeded
from tests.refusals import refuses

D = torch.float64
DGL = LocalHead(head="dgl", norm="batch")
HEADS = [
    LocalHead("greedy"),
    DGL,
    LocalHead("dgl", "group", 2),
    LocalHead("dgl", "none", hidden=0),
]
every_head = pytest.mark.parametrize("objective", HEADS, ids=lambda o: f"{o.head}-{o.norm}")


def make_spec(output_shape: tuple[int, ...]) -> BlockSpec:
    return BlockSpec(0, 3, (3, 8, 8), output_shape, D, 10)


def head(objective: LocalHead, output_shape: tuple[int, ...]) -> nn.Module:
    with seeded("head"):
        return objective.build_head(make_spec(output_shape)).to(D)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


# The networks


def test_a_greedy_head_is_the_mean_over_pixels_and_one_linear_layer() -> None:
    greedy = head(LocalHead(), (6, 5, 4))
    x = torch.randn(7, 6, 5, 4, dtype=D)
    weight, bias = greedy.parameters()
    assert (weight.shape, bias.shape) == ((10, 6), (10,))
    torch.testing.assert_close(greedy(x), x.flatten(2).mean(2) @ weight.T + bias)


@pytest.mark.parametrize(("size", "pooled", "final"), [(16, 4, 2), (9, 3, 2), (8, 2, 2), (4, 1, 1)])
def test_a_dgl_head_is_the_papers_network(size: int, pooled: int, final: int) -> None:
    """With functions of torch alone; 4 c units with 2 x 2 pixels."""
    dgl = head(DGL, (6, size, size))
    x = torch.randn(7, 6, size, size, dtype=D)
    scores, weights = dgl(x), list(dgl.parameters())
    width = 6 * final**2
    assert [tuple(w.shape) for w in weights if w.dim() > 1] == [
        *[(6, 6, 1, 1)] * 3,
        *[(width, width)] * 3,
        (10, width),
    ]

    def norm_relu(y: Tensor) -> Tensor:
        dims = [0, *range(2, y.dim())]
        mean, variance = y.mean(dims, True), y.var(dims, unbiased=False, keepdim=True)
        scale, shift = (weights.pop(0).view(1, -1, *[1] * (y.dim() - 2)) for _ in range(2))
        return ((y - mean) / (variance + 1e-5).sqrt() * scale + shift).relu()

    x = functional.adaptive_avg_pool2d(x, pooled)
    for _ in range(3):
        x = norm_relu(functional.conv2d(x, weights.pop(0)))
    x = functional.adaptive_avg_pool2d(x, final).flatten(1)
    for _ in range(3):
        x = norm_relu(functional.linear(x, weights.pop(0), weights.pop(0)))
    torch.testing.assert_close(scores, functional.linear(x, *weights))


@pytest.mark.parametrize("output_shape", [(12,), (3, 4)])
def test_outputs_that_are_no_images_are_flattened(output_shape: tuple[int, ...]) -> None:
    x = torch.randn(5, *output_shape, dtype=D)
    greedy = head(LocalHead(), output_shape)
    weight, bias = greedy.parameters()
    torch.testing.assert_close(greedy(x), x.flatten(1) @ weight.T + bias)
    layers = [m for m in head(DGL, output_shape).modules() if isinstance(m, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(12, 12)] * 3 + [
        (12, 10)
    ]


def test_multiply_adds_of_a_head_are_counted_by_hand() -> None:
    """16 channels of 32 x 32: 8 x 8 pixels for three 1x1 convolutions, then 64 units."""
    spec = profile_module(head(DGL, (16, 32, 32)), (16, 32, 32), D, device="cpu")
    macs = 3 * 16 * 16 * 8 * 8 + 3 * 64 * 64 + 64 * 10
    assert (spec.forward_macs, spec.weight_gradient_macs, spec.input_gradient_macs) == (macs,) * 3
    assert spec.couples_samples


def test_a_cut_costs_what_its_head_costs() -> None:
    net = load_model("resnet", {"depth": 8}, Path(), (3, 32, 32), 10)
    layer_specs = infer_layers(net, (3, 32, 32), torch.float32)
    data_spec = BlockSpec.from_data((3, 32, 32), 10)
    alone, with_head, greedy, dgl = (
        BlockCosts(layer_specs, objective, net, data_spec)
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
    with refuses(ConfigError, "objective.hidden-negative"):
        LocalHead(hidden=-1)
    with refuses(ConfigError, "objective.depth-too-small"):
        LocalHead(depth=0)
    with refuses(ConfigError, "objective.pyramid-out-of-range"):
        LocalHead(pyramid=1.5)
    with pytest.raises(ConfigError):  # 12 channels are not 8 groups
        head(LocalHead("dgl", "group"), (12, 4, 4))


# The laws, block by block


@cache
def small_model() -> tuple[LayerStack, tuple[LayerProfile, ...]]:
    net = load_model("resnet", {"depth": 8, "width": 4}, Path(), (3, 8, 8), 3)
    return net, infer_layers(net, (3, 8, 8), D)


def make_blocks(
    objective: LocalHead, cuts: tuple[int, ...] = (2, 3)
) -> list[tuple[BlockSpec, Block]]:
    """Return a ResNet-8 of width 4 with its heads, cut at layers, in float64."""
    net, layer_specs = small_model()
    blocks = []
    for index, (i, j) in enumerate(itertools.pairwise((0, *cuts, len(layer_specs)))):
        shapes = layer_specs[i].input_shape, layer_specs[j - 1].output_shape
        spec = BlockSpec(index, len(cuts) + 1, *shapes, D, 3)
        with seeded("heads", index):
            head = objective.make_head(spec)
        layers = net.build(range(i, j), 1, D)
        blocks.append((spec, Block(index, layers, head and head.to(D), sgd)))
    return blocks


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
    blocks = make_blocks(objective)
    for index, (spec, block) in enumerate(blocks):
        x = x.detach()
        micro_batch = MicroBatch(x, block.forward(x, ()), y)
        block.backward(objective.backward_pairs(spec, block, micro_batch))
        for other_index, (_, other) in enumerate(blocks):
            has_gradient = other_index == index
            assert all((p.grad is not None) == has_gradient for p in other.trainable_parameters)
            for parameter in other.trainable_parameters:
                parameter.grad = None
        x = micro_batch.y


@every_head
def test_one_backward_of_the_sum_is_the_blocks_own(
    objective: LocalHead, batch: tuple[Tensor, Tensor]
) -> None:
    """Bit for bit: the losses of all blocks, detached from each other, summed or separately."""
    x, y = batch
    separate, joint = make_blocks(objective), make_blocks(objective)
    losses = []
    for (spec, block), (_, twin) in zip(separate, joint, strict=True):
        x = x.detach()
        micro_batch = MicroBatch(x, block.forward(x, ()), y)
        block.backward(objective.backward_pairs(spec, block, micro_batch))
        output = twin.forward(x, ())
        losses.append(cross_entropy(output if twin.head is None else twin.head(output), y))
        x = micro_batch.y
    torch.stack(losses).sum().backward()
    for (_, block), (_, twin) in zip(separate, joint, strict=True):
        for ours, theirs in zip(block.gradients(), twin.gradients(), strict=True):
            assert torch.equal(ours, theirs)


@every_head
def test_one_block_is_ordinary_backprop(objective: LocalHead, batch: tuple[Tensor, Tensor]) -> None:
    """Law 4 on a ResNet, bit for bit, over several updates."""
    x, y = batch
    (spec, ours), (_, theirs) = *make_blocks(objective, ()), *make_blocks(objective, ())
    plain = nn.Sequential(*theirs.layers.values())
    optimizer = sgd(plain.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
        micro_batch = MicroBatch(x, ours.forward(x, ()), y)
        ours.backward(objective.backward_pairs(spec, ours, micro_batch))
        ours.update()
    for parameter, expected in zip(ours.trainable_parameters, plain.parameters(), strict=True):
        assert torch.equal(parameter, expected)
