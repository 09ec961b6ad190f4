"""AugLocal's heads: which layers they are shaped by, how many units, and what they cost."""

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
from dtrain.errors import DtrainError
from dtrain.models import load_model
from dtrain.models.resnet import ResidualUnit
from dtrain.models.shape_inference import infer_layers
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.head_networks import auglocal, sample_shapes
from dtrain.objectives.local_head import LocalHead
from dtrain.planning.block_costs import BlockCosts, total_macs
from dtrain.rng import seeded

D = torch.float64
AUG = LocalHead("auglocal")


def at(block: int, blocks: int) -> BlockSpec:
    return BlockSpec(block, blocks, (3, 8, 8), (4, 8, 8), D, 10)


# How many units


@pytest.mark.parametrize(
    ("blocks", "depth", "aux"), [(16, 2, 30), (55, 3, 135), (55, 5, 216), (3, 4, 6), (2, 4, 4)]
)
def test_units_over_all_blocks(blocks: int, depth: int, aux: int) -> None:
    """The published sums; beside them three blocks (4 and 2) and two (4), counted by hand."""
    objective = LocalHead("auglocal", depth=depth)
    units = [objective.unit_count(at(block, blocks)) for block in range(blocks - 1)]
    assert sum(units) == aux
    assert units == sorted(units, reverse=True)


@pytest.mark.parametrize(("pyramid", "units"), [(0.0, [4, 4, 4]), (0.5, [4, 3, 2]), (1, [4, 2, 1])])
def test_a_pyramid_ends_where_it_says(pyramid: float, units: list[int]) -> None:
    objective = LocalHead("auglocal", depth=4, pyramid=pyramid)
    assert [objective.unit_count(at(block, 4)) for block in range(3)] == units


def test_wrong_numbers_are_refused() -> None:
    for fields, text in (({"depth": 0}, "depth = 0.*greedy"), ({"pyramid": 1.5}, "pyramid = 1.5")):
        with pytest.raises(DtrainError, match=text):
            LocalHead("auglocal", **fields)


# Which layers


def test_samples_are_evenly_spread_and_end_with_the_last_layer() -> None:
    """Layers k + 1 ... n - 1 of n = 14, with k = 4: round(k + (n - k - 1) i / d), i = 1 ... d."""
    later = [(each,) for each in range(5, 14)]
    for count in (1, 3, 4, 5, 7, 8):  # none of them falls between two layers
        assert sample_shapes(later, count) == [
            (round(4 + 9 * i / count),) for i in range(1, count + 1)
        ]
    assert sample_shapes(later, 3) == [(7,), (10,), (13,)]
    assert sample_shapes(later, 9) == sample_shapes(later, 20) == later
    assert sample_shapes([], 2) == []


@cache
def walked() -> Any:
    """Return ResNet-20 and what is known of its layers."""
    net = load_model("resnet", {"depth": 20}, Path(), (3, 32, 32), 10)
    return net, infer_layers(net, (3, 32, 32), torch.float32)


def priced(objective: Any) -> tuple[BlockCosts, Any]:
    net, specs = walked()
    return BlockCosts(specs, objective, net, BlockSpec.from_data((3, 32, 32), 10), 7), specs


def test_only_this_head_looks_ahead() -> None:
    assert (
        AUG.needs_downstream_layers,
        LocalHead().needs_downstream_layers,
        LocalHead("dgl").needs_downstream_layers,
    ) == (True, False, False)
    assert priced(LocalHead())[0].block_spec(0, 2, 0, 3).downstream_layers == ()


def test_the_shapes_of_a_resnets_head() -> None:
    """ResNet-20 cut behind unit1-2: seven units come later, of which d = 2 are 4 and 7."""
    prices, _ = priced(AUG)
    task = prices.block_spec(0, 2, 0, 3)
    assert [each.name for each in task.downstream_layers][3::3] == ["unit2-3", "unit3-3"]
    with torch.device("meta"):
        head = AUG.build_head(task)
    units = [each for each in head.modules() if isinstance(each, ResidualUnit)]
    shapes, x = [], torch.zeros(2, 16, 32, 32, device="meta")
    for unit in units:
        x = unit(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(32, 16, 16), (64, 8, 8)]
    assert head(torch.zeros(2, 16, 32, 32, device="meta")).shape == (2, 10)


def test_a_head_before_the_models_own_is_greedy() -> None:
    prices, specs = priced(AUG)
    task = prices.block_spec(0, 2, 0, len(specs) - 1)
    assert [each.name for each in task.downstream_layers] == ["head"]
    with torch.device("meta"):
        assert [tuple(p.shape) for p in AUG.build_head(task).parameters()] == [(10, 64), (10,)]


def test_heads_are_part_of_what_is_balanced() -> None:
    """The first block of two is shorter than without them, and the price is the unit's by hand."""
    (prices, _), (plain, _) = priced(AUG), priced(LocalHead())
    j = 3
    first, second = 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32, 9 * 32 * 64 + 9 * 64 * 64 + 32 * 64
    forward = 256 * first + 64 * second + 640
    found = prices.head_spec(prices.block_spec(0, 2, 0, j))
    assert found is not None
    assert (found.forward_macs, found.couples_samples) == (forward, True)
    greedy = plain.head_spec(plain.block_spec(0, 2, 0, j))
    assert prices.flops(0, j) - plain.flops(0, j) == total_macs(found) - total_macs(greedy)

    def cut(own: BlockCosts) -> int:
        return min((2, 4, 5, 6), key=lambda j: max(own.flops(0, j), own.flops(j, 10)))

    assert cut(prices) < cut(plain)


# What they are made of


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
    made = auglocal(first, [*images, *flat], 3, unit, norm, 2).to(D)
    found: list[Any] = [first]
    for each in made:
        each.register_forward_hook(lambda _m, _a, out: found.append(tuple(out.shape[1:])))
    assert made(torch.randn(5, *first, dtype=D)).shape == (5, 3)
    kept = [shape for shape in images if shape in found]
    assert kept == images
    linear = [each.out_features for each in made.modules() if isinstance(each, nn.Linear)]
    assert linear == [*map(math.prod, flat), 3]
    norms = [each for each in made.modules() if "Norm" in type(each).__name__]
    assert bool(norms) == (norm != "none" and bool(images))


def test_flat_heads_are_linear_and_relu() -> None:
    made = auglocal((12,), [(7,), (6,)], 3, "residual", "batch", 8).to(D)
    x = torch.randn(5, 12, dtype=D)
    w = list(made.parameters())
    hidden = ((x @ w[0].T + w[1]).relu() @ w[2].T + w[3]).relu()
    torch.testing.assert_close(made(x), hidden @ w[4].T + w[5])


# The laws


def blocks(cuts: tuple[int, ...]) -> list[tuple[BlockSpec, Block]]:
    """Return a ResNet-8 of width 4 with its heads, cut at layers, in float64."""
    net = load_model("resnet", {"depth": 8, "width": 4}, Path(), (3, 8, 8), 3)
    specs = infer_layers(net, (3, 8, 8), D)
    prices = BlockCosts(specs, AUG, net, BlockSpec.from_data((3, 8, 8), 3), 1)
    made = []
    for index, (i, j) in enumerate(itertools.pairwise((0, *cuts, len(specs)))):
        task = prices.block_spec(index, len(cuts) + 1, i, j)
        with seeded("heads", index):
            helper = AUG.make_head(task)
        layers = net.build(range(i, j), 1, D)
        made.append((task, Block(index, layers, helper and helper.to(D), step)))
    return made


def step(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(6, 3, 8, 8, dtype=D), torch.randint(0, 3, (6,))


def test_the_loss_of_a_block_moves_no_other(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    made = blocks((2, 3))
    for own, (task, learner) in enumerate(made):
        live = MicroBatch(x.detach(), learner.forward(x.detach(), ()), y)
        learner.backward(AUG.backward_pairs(task, learner, live))
        for other, (_, each) in enumerate(made):
            assert all((p.grad is not None) == (own == other) for p in each.trainable_parameters)
            for parameter in each.trainable_parameters:
                parameter.grad = None
        x = live.y


def test_one_block_is_backprop(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    [(task, ours)], [(_, theirs)] = blocks(()), blocks(())
    ours.backward(AUG.backward_pairs(task, ours, MicroBatch(x, ours.forward(x, ()), y)))
    cross_entropy(nn.Sequential(*theirs.layers.values())(x), y).backward()
    assert all(map(torch.equal, ours.gradients(), theirs.gradients()))
