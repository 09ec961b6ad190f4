"""AugLocal's heads: the layers that they sample, their numbers of units and their costs."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.layers import LayerStack
from dtrain.models.resnet import ResidualUnit
from dtrain.models.shape_inference import LayerProfile, infer_layers
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.head_networks import auglocal, sample_shapes
from dtrain.objectives.local_head import LocalHead
from dtrain.planning.block_costs import BlockCosts, total_macs
from dtrain.rng import seeded
from tests.refusals import refuses

D = torch.float64
AUG = LocalHead("auglocal")


def at(block: int, blocks: int) -> BlockSpec:
    return BlockSpec(block, blocks, (3, 8, 8), (4, 8, 8), D, 10)


# Numbers of units


@pytest.mark.parametrize(
    ("blocks", "depth", "aux"), [(16, 2, 30), (55, 3, 135), (55, 5, 216), (3, 4, 6), (2, 4, 4)]
)
def test_units_over_all_blocks(blocks: int, depth: int, aux: int) -> None:
    """The published sums, and those of three blocks (4 + 2) and of two (4), counted by hand."""
    objective = LocalHead("auglocal", depth=depth)
    units = [objective.unit_count(at(block, blocks)) for block in range(blocks - 1)]
    assert sum(units) == aux
    assert units == sorted(units, reverse=True)


@pytest.mark.parametrize(("pyramid", "units"), [(0.0, [4, 4, 4]), (0.5, [4, 3, 2]), (1, [4, 2, 1])])
def test_a_pyramid_ends_where_it_says(pyramid: float, units: list[int]) -> None:
    objective = LocalHead("auglocal", depth=4, pyramid=pyramid)
    assert [objective.unit_count(at(block, 4)) for block in range(3)] == units


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"depth": 0}, "objective.depth-too-small"),
        ({"pyramid": 1.5}, "objective.pyramid-out-of-range"),
    ],
)
def test_wrong_numbers_are_refused(fields: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        LocalHead("auglocal", **fields)


# Sampled layers


def test_samples_are_evenly_spread_and_end_with_the_last_layer() -> None:
    """Layers k + 1 ... n - 1 of n = 14, with k = 4: round(k + (n - k - 1) i / d), i = 1 ... d."""
    later = [(layer,) for layer in range(5, 14)]
    for count in (1, 3, 4, 5, 7, 8):  # none of them falls between two layers
        assert sample_shapes(later, count) == [
            (round(4 + 9 * i / count),) for i in range(1, count + 1)
        ]
    assert sample_shapes(later, 3) == [(7,), (10,), (13,)]
    assert sample_shapes(later, 9) == sample_shapes(later, 20) == later
    assert sample_shapes([], 2) == []


@cache
def resnet20() -> tuple[LayerStack, tuple[LayerProfile, ...]]:
    net = load_model("resnet", {"depth": 20}, Path(), (3, 32, 32), 10)
    return net, infer_layers(net, (3, 32, 32), torch.float32)


def resnet20_costs(objective: Objective) -> BlockCosts:
    net, specs = resnet20()
    return BlockCosts(specs, objective, net, BlockSpec.from_data((3, 32, 32), 10), 7)


def test_only_this_head_needs_downstream_layers() -> None:
    heads = [AUG, LocalHead(), LocalHead("dgl")]
    assert [head.needs_downstream_layers for head in heads] == [True, False, False]
    assert resnet20_costs(LocalHead()).block_spec(0, 2, 0, 3).downstream_layers == ()


def test_the_shapes_of_a_resnets_head() -> None:
    """ResNet-20 cut behind unit1-2: of the seven later units, d = 2 samples numbers 4 and 7."""
    spec = resnet20_costs(AUG).block_spec(0, 2, 0, 3)
    assert [layer.name for layer in spec.downstream_layers][3::3] == ["unit2-3", "unit3-3"]
    with torch.device("meta"):
        head = AUG.build_head(spec)
    units = [module for module in head.modules() if isinstance(module, ResidualUnit)]
    shapes, x = [], torch.zeros(2, 16, 32, 32, device="meta")
    for unit in units:
        x = unit(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(32, 16, 16), (64, 8, 8)]
    assert head(torch.zeros(2, 16, 32, 32, device="meta")).shape == (2, 10)


def test_a_head_before_the_models_own_is_greedy() -> None:
    _, specs = resnet20()
    spec = resnet20_costs(AUG).block_spec(0, 2, 0, len(specs) - 1)
    assert [layer.name for layer in spec.downstream_layers] == ["head"]
    with torch.device("meta"):
        parameters = list(AUG.build_head(spec).parameters())
    assert [tuple(parameter.shape) for parameter in parameters] == [(10, 64), (10,)]


def test_balancing_includes_the_heads() -> None:
    """The first block of two is shorter than with greedy heads; costs are counted by hand."""
    auglocal_costs, greedy_costs = resnet20_costs(AUG), resnet20_costs(LocalHead())
    j = 3
    first, second = 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32, 9 * 32 * 64 + 9 * 64 * 64 + 32 * 64
    forward_macs = 256 * first + 64 * second + 640
    head = auglocal_costs.head_spec(auglocal_costs.block_spec(0, 2, 0, j))
    assert head is not None
    assert (head.forward_macs, head.couples_samples) == (forward_macs, True)
    greedy_head = greedy_costs.head_spec(greedy_costs.block_spec(0, 2, 0, j))
    difference = total_macs(head) - total_macs(greedy_head)
    assert auglocal_costs.flops(0, j) - greedy_costs.flops(0, j) == difference

    def best_cut(costs: BlockCosts) -> int:
        return min((2, 4, 5, 6), key=lambda j: max(costs.flops(0, j), costs.flops(j, 10)))

    assert best_cut(auglocal_costs) < best_cut(greedy_costs)


# Networks of the heads


@pytest.mark.parametrize("unit", ["residual", "convolution"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(
    ("first", "images", "flat"),
    [
        ((4, 9, 7), [(8, 5, 4), (8, 2, 1)], []),  # strides that round up
        ((4, 16, 16), [(8, 4, 4)], []),  # two resolutions at once
        ((4, 9, 7), [(4, 4, 3)], []),  # as a maximum over 2 x 2 pixels rounds down
        ((8, 4, 4), [(4, 8, 8), (2, 8, 8)], []),  # larger, and fewer channels
        ((4, 6, 6), [(4, 3, 3)], [(12,), (2, 3)]),
        ((12,), [], [(7,), (4, 6, 6)]),
    ],
    ids=str,
)
def test_units_have_the_shapes_that_were_sampled(
    unit: Any, norm: Any, first: Any, images: Any, flat: Any
) -> None:
    head = auglocal(first, [*images, *flat], 3, unit, norm, 2).to(D)
    shapes: list[Any] = [first]
    for layer in head:
        layer.register_forward_hook(lambda _m, _a, out: shapes.append(tuple(out.shape[1:])))
    assert head(torch.randn(5, *first, dtype=D)).shape == (5, 3)
    assert [shape for shape in images if shape in shapes] == images
    linear = [module.out_features for module in head.modules() if isinstance(module, nn.Linear)]
    assert linear == [*map(math.prod, flat), 3]
    norms = [module for module in head.modules() if "Norm" in type(module).__name__]
    assert bool(norms) == (norm != "none" and bool(images))


def test_flat_heads_are_linear_and_relu() -> None:
    head = auglocal((12,), [(7,), (6,)], 3, "residual", "batch", 8).to(D)
    x = torch.randn(5, 12, dtype=D)
    w = list(head.parameters())
    hidden = ((x @ w[0].T + w[1]).relu() @ w[2].T + w[3]).relu()
    torch.testing.assert_close(head(x), hidden @ w[4].T + w[5])


# The laws


def make_blocks(cuts: tuple[int, ...]) -> list[tuple[BlockSpec, Block]]:
    """Return the blocks of a ResNet-8 of width 4 with its heads, cut at layers, in float64."""
    net = load_model("resnet", {"depth": 8, "width": 4}, Path(), (3, 8, 8), 3)
    specs = infer_layers(net, (3, 8, 8), D)
    costs = BlockCosts(specs, AUG, net, BlockSpec.from_data((3, 8, 8), 3), 1)
    blocks = []
    for index, (i, j) in enumerate(itertools.pairwise((0, *cuts, len(specs)))):
        spec = costs.block_spec(index, len(cuts) + 1, i, j)
        with seeded("heads", index):
            head = AUG.make_head(spec)
        layers = net.build(range(i, j), 1, D)
        blocks.append((spec, Block(index, layers, head and head.to(D), make_sgd)))
    return blocks


def make_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(6, 3, 8, 8, dtype=D), torch.randint(0, 3, (6,))


def test_the_loss_of_a_block_moves_no_other(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    blocks = make_blocks((2, 3))
    for index, (spec, block) in enumerate(blocks):
        micro_batch = MicroBatch(x.detach(), block.forward(x.detach(), ()), y)
        block.backward(AUG.backward_pairs(spec, block, micro_batch))
        for other, (_, other_block) in enumerate(blocks):
            for parameter in other_block.trainable_parameters:
                assert (parameter.grad is not None) == (other == index)
                parameter.grad = None
        x = micro_batch.y


def test_one_block_is_backprop(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    [(spec, block)], [(_, reference)] = make_blocks(()), make_blocks(())
    micro_batch = MicroBatch(x, block.forward(x, ()), y)
    block.backward(AUG.backward_pairs(spec, block, micro_batch))
    cross_entropy(nn.Sequential(*reference.layers.values())(x), y).backward()
    assert all(map(torch.equal, block.gradients(), reference.gradients()))
