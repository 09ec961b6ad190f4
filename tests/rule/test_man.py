"""MAN: the copies, their messages and averages, and the laws."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.build import build_rank
from dtrain.comm.backends.threads import run_ranks
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.layers import as_layers
from dtrain.models.shape_inference import infer_layers
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.layer_weights import flat_parameters
from dtrain.objectives.common.reconstruction import ReconstructionHead
from dtrain.objectives.man import LAYER, EmaPair, Man
from dtrain.planning.block_costs import BlockCosts, total_macs
from dtrain.planning.plan import make_plan
from dtrain.rng import seeded
from dtrain.schedules.actions import Point, Route
from dtrain.schedules.stream import Stream
from tests import tiny
from tests.refusals import refuses
from tests.rule.warning_numbers import numbers_in

D = torch.float64
SHAPE = (3, 8, 8)


@cache
def resnet(width: int = 4) -> Any:
    model = load_model("resnet", {"depth": 8, "width": width}, Path(), SHAPE, 3)
    return model, infer_layers(model, SHAPE, D)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def make_specs(objective: Man, cuts: tuple[int, ...] = (2, 3)) -> list[BlockSpec]:
    """Return the specs of the blocks of a ResNet-8 that is cut at layers."""
    model, layer_specs = resnet()
    costs = BlockCosts(
        layer_specs, objective, model, BlockSpec.from_data(SHAPE, 3, has_raw_samples=True), 1
    )
    bounds = itertools.pairwise((0, *cuts, len(layer_specs)))
    return [costs.block_spec(b, len(cuts) + 1, i, j) for b, (i, j) in enumerate(bounds)]


def make_block(
    objective: Man, index: int, cuts: tuple[int, ...] = (2, 3)
) -> tuple[BlockSpec, Block]:
    """Return one of these blocks and its spec, in float64, with the weights of seed 1."""
    spec = make_specs(objective, cuts)[index]
    bounds = (0, *cuts, 5)
    layers = resnet()[0].build(range(bounds[index], bounds[index + 1]), 1, D)
    with seeded("heads", index):
        head = objective.make_head(spec)
    return spec, Block(index, layers, head and head.to(D), sgd)


def ema_pair(block: Block) -> EmaPair:
    assert isinstance(block.head, ReconstructionHead)
    assert isinstance(block.head.path, EmaPair)
    return block.head.path


@pytest.fixture
def micro_batch() -> MicroBatch:
    with seeded("batch"):
        x, y = torch.randn(6, 3, 8, 8, dtype=D), torch.randint(0, 3, (6,))
        return MicroBatch(x, x, y, 0.5, samples=x, raw_samples=torch.rand(6, 3, 8, 8, dtype=D))


# The copies


def test_both_copies_start_as_the_next_blocks_first_layer() -> None:
    """Bit for bit the initial weights of the next block, in memory of their own."""
    (_, block), (_, next_block) = make_block(Man(), 0), make_block(Man(), 1)
    first = next(iter(next_block.layers.values()))
    for copy in (ema_pair(block).learnt, ema_pair(block).slow):
        assert torch.equal(flat_parameters(copy), flat_parameters(first))
    memory = [{p.data_ptr() for p in copy.parameters()} for copy in ema_pair(block).children()]
    assert not memory[0] & memory[1]
    assert [p.requires_grad for p in ema_pair(block).slow.parameters()] == [False] * 6
    assert all(p.requires_grad for p in ema_pair(block).learnt.parameters())


@pytest.mark.parametrize("index", [0, 1])
def test_drawn_copies_start_from_different_weights(index: int) -> None:
    _, block = make_block(Man(start="drawn"), index)
    _, next_block = make_block(Man(), index + 1)
    convolutions = [
        [module.weight for module in layer.modules() if isinstance(module, nn.Conv2d)]
        for layer in (*ema_pair(block).children(), next(iter(next_block.layers.values())))
    ]
    for one, other in itertools.combinations(convolutions, 2):
        assert not any(map(torch.equal, one, other))
    wide = load_model("resnet", {"depth": 8, "width": 64}, Path(), SHAPE, 3)
    layer = EmaPair(wide.rebuild_layer(2, 0, D), redraw=True).learnt
    weight = next(layer.parameters())
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_copies_of_a_perceptrons_layer() -> None:
    mlp = load_model("mlp", {"widths": [9, 7, 6]}, Path(), (10,), 3)
    layer_specs = infer_layers(mlp, (10,), D)
    for start in ("next", "drawn"):
        objective = Man(start=start)
        costs = BlockCosts(layer_specs, objective, mlp, BlockSpec.from_data((10,), 3), 1)
        spec = costs.block_spec(0, 2, 0, 1)
        with seeded("heads"):
            head = objective.build_head(spec)
        assert isinstance(head, ReconstructionHead)
        first = flat_parameters(mlp.build([1], 1, torch.float32)["fc2"]).double()
        copies = [flat_parameters(copy).double() for copy in head.path.children()]
        assert [torch.equal(copy, first) for copy in copies] == [start == "next"] * 2
        assert head.double()(torch.zeros(2, 9, dtype=D)).shape == (2, 3 + 10)


def test_the_loss_is_the_formula(micro_batch: MicroBatch) -> None:
    """y = LB(h) + EMA(h); h, not y, is sent forward."""
    objective = Man(lambda_first=(2.0, 0.25))
    (spec, block), (_, twin) = make_block(objective, 0), make_block(objective, 0)
    micro_batch.y = block.forward(micro_batch.x, ())
    [(loss, factor)] = objective.backward_pairs(spec, block, micro_batch)
    h = twin.forward(micro_batch.x, ())
    head = twin.head
    assert isinstance(head, ReconstructionHead)
    y = ema_pair(twin).learnt(h) + ema_pair(twin).slow(h)
    reconstruction = binary_cross_entropy_with_logits(head.decoder(y), micro_batch.raw_samples)
    ce = cross_entropy(head.head(y), micro_batch.targets)
    assert torch.equal(loss, torch.stack([0.25 * ce, 2 * reconstruction]).sum())
    assert float(factor) == 0.5
    route = Route(Point(0, "F"), Point(1, "F"), "activation")
    assert torch.equal(objective.make_message(route, block, micro_batch), h)


def test_no_gradient_reaches_the_slow_copy_but_one_passes_through_it(
    micro_batch: MicroBatch,
) -> None:
    spec, block = make_block(Man(), 0)
    before = flat_parameters(ema_pair(block).slow)
    micro_batch.y = block.forward(micro_batch.x, ())
    block.backward(Man().backward_pairs(spec, block, micro_batch))
    assert all(p.grad is None for p in ema_pair(block).slow.parameters())
    assert all(p.grad is not None and p.grad.any() for p in ema_pair(block).learnt.parameters())
    block.update()
    assert torch.equal(flat_parameters(ema_pair(block).slow), before)
    assert not torch.equal(flat_parameters(ema_pair(block).learnt), before)
    h = torch.randn(2, *spec.output_shape, dtype=D, requires_grad=True)
    ema_pair(block).slow(h).sum().backward()
    assert h.grad is not None
    assert h.grad.any()


def test_layers_that_work_in_place_do_not_write_to_the_common_input() -> None:
    pair = EmaPair(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)).double())
    x = torch.randn(3, 4, dtype=D)
    before = x.clone()
    torch.testing.assert_close(pair(x), 2 * pair.learnt[1](before.relu()))
    assert torch.equal(x, before)


# The moving average


def test_the_moving_average_is_its_closed_form() -> None:
    """m^t theta_0 + (1 - m) sum over i of m^(t - i) theta_i."""
    objective, t = Man(momentum=0.9), 12
    spec, block = make_block(objective, 0)
    first = flat_parameters(ema_pair(block).slow)
    with seeded("theta"):
        theta = torch.randn(t, len(first), dtype=D)
    for weights in theta:
        objective.after_update(spec, block, {LAYER: weights})
    powers = 0.9 ** torch.arange(t - 1, -1, -1, dtype=D)
    expected = 0.9**t * first + 0.1 * powers @ theta
    torch.testing.assert_close(
        flat_parameters(ema_pair(block).slow), expected, rtol=1e-12, atol=1e-14
    )


def test_it_does_not_change_without_a_message_and_momentum_1_sends_none() -> None:
    spec, block = make_block(Man(), 0)
    before = flat_parameters(ema_pair(block).slow)
    Man().after_update(spec, block, {})
    assert torch.equal(flat_parameters(ema_pair(block).slow), before)
    routes = [(r.name, r.source.block, r.lag) for r in Man().routes(3, "train")]
    assert routes == [("activation", 0, 0), ("activation", 1, 0), (LAYER, 1, 2), (LAYER, 2, 2)]
    assert [r.name for r in Man(momentum=1.0).routes(3, "train")] == ["activation"] * 2
    assert LAYER not in [r.name for r in Man().routes(3, "predict")]


def test_batch_statistics_are_the_copies_own(micro_batch: MicroBatch) -> None:
    """They come from the input of each copy and are not averaged."""
    spec, block = make_block(Man(), 0)
    block.train()
    micro_batch.y = block.forward(micro_batch.x, ())
    Man().backward_pairs(spec, block, micro_batch)
    norms = [
        [m for m in copy.modules() if isinstance(m, nn.BatchNorm2d)]
        for copy in ema_pair(block).children()
    ]
    learnt, slow = (modules[0].running_mean for modules in norms)
    assert torch.equal(learnt, slow)
    assert slow.any()
    before = {name: tensor.clone() for name, tensor in ema_pair(block).slow.named_buffers()}
    weights = torch.ones_like(flat_parameters(ema_pair(block).slow))
    Man().after_update(spec, block, {LAYER: weights})
    for name, tensor in ema_pair(block).slow.named_buffers():
        assert torch.equal(tensor, before[name])


# Messages


def test_the_message_is_the_parameters_of_one_layer() -> None:
    """unit1-1 and unit3-1 of width 4 by hand: two 3x3 convolutions and two norms."""
    specs = make_specs(Man(), (1, 3))
    routes = [r for r in Man().routes(3, "train") if r.name == LAYER]
    weights = 2 * 9 * 4 * 4 + 2 * 8
    assert Man().message_spec(routes[0], specs, 0) == ((weights,), D)
    message = Man().make_message(routes[0], make_block(Man(), 1, (1, 3))[1], None)
    assert (message.shape, message.dtype) == ((weights,), D)
    assert Man().message_spec(routes[1], specs, 0) == ((9 * 8 * 16 + 9 * 16 * 16 + 4 * 16,), D)


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_a_lag_of_two_can_stream(lag: int) -> None:
    assert all(Stream().supports(r) for r in Man(lag=lag).routes(4, "train")) == (lag >= 2)


def test_the_average_over_a_run_follows_the_neighbours_weights() -> None:
    """Weights of `lag` updates before arrive, none in the first two updates of a segment."""
    run = tiny.run(objective={"name": "man", "momentum": 0.5}, micro_batches=1, mesh__stages=2)
    plan = make_plan(run, 2)

    def work(comm: Any) -> list[tuple[Tensor | None, Tensor | None]]:
        job = build_rank(plan, comm)
        sequence = epoch_order(50, 3, 0, "full")
        batches = [plan.batch_splitter.batch(sequence, update, 0) for update in range(4)]
        blocks = job.engine.blocks
        history = [snapshot(blocks)]
        for _ in job.engine.run(job.train_loader, batches, 0, 0):
            history.append(snapshot(blocks))
        return history

    def snapshot(blocks: dict[int, Block]) -> Any:
        """Return the EMA in block 1, and the weights of the layer in block 2 that it averages."""
        slow = flat_parameters(ema_pair(blocks[1]).slow) if 1 in blocks else None
        layer = next(iter(blocks[2].layers.values())) if 2 in blocks else None
        return slow, None if layer is None else flat_parameters(layer)

    plan = replace(plan, layout=replace(plan.layout, place=(0, 0, 1)))
    # A rank yields after the updates of its last block: block 1 on rank 0, block 2 on rank 1.
    first_rank, second_rank = run_ranks(2, work, seed=0)
    slow, theta = [ema for ema, _ in first_rank], [layer for _, layer in second_rank]
    assert torch.equal(slow[0], slow[2])
    for update in (2, 3):
        expected = 0.5 * slow[update] + 0.5 * theta[update - 1]
        torch.testing.assert_close(slow[update + 1], expected)
        assert not torch.equal(slow[update + 1], slow[update])


def test_a_layer_without_parameters_is_warned_of_and_runs() -> None:
    """Its messages are empty."""
    layers = [nn.Flatten, lambda: nn.Linear(10, 7), nn.ReLU, lambda: nn.Linear(7, 3)]
    model = as_layers(lambda: [(f"l{n}", layer) for n, layer in enumerate(layers)], "own")
    layer_specs = infer_layers(model, (2, 5), D)
    costs = BlockCosts(layer_specs, Man(), model, BlockSpec.from_data((2, 5), 3), 1)
    specs = [costs.block_spec(0, 2, 0, 2), costs.block_spec(1, 2, 2, 4)]
    [warning] = Man().warnings(specs, 8)
    assert numbers_in(warning) >= {"0", "1"}
    assert "'l2'" in warning
    assert Man().warnings([costs.block_spec(0, 2, 0, 3), costs.block_spec(1, 2, 3, 4)], 8) == []
    [route] = [r for r in Man().routes(2, "train") if r.name == LAYER]
    block = Block(1, {"l2": nn.ReLU(), "l3": nn.Linear(7, 3)}, None, sgd)
    message = Man().make_message(route, block, None)
    assert (message.shape, message.dtype) == Man().message_spec(route, specs, 0)


# Costs, errors, laws


def test_both_copies_are_part_of_the_costs() -> None:
    model, layer_specs = resnet()
    objective = Man(lambda_first=(0.0, 1.0), head="greedy")
    costs = BlockCosts(layer_specs, objective, model, BlockSpec.from_data(SHAPE, 3))
    head = costs.head_spec(costs.block_spec(0, 2, 0, 2))
    layer, linear_macs = layer_specs[2], 16 * 3 // 2
    assert head is not None
    assert head.forward_macs == 2 * layer.forward_macs + linear_macs
    assert head.input_gradient_macs == 2 * layer.input_gradient_macs + linear_macs
    # One copy has no weight gradients.
    assert total_macs(head) < 2 * total_macs(layer) + 3 * linear_macs


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"momentum": 1.1}, "objective.momentum-out-of-range"),
        ({"lag": -1}, "objective.lag-negative"),
        ({"lambda_last": (0.0, 0.0)}, "objective.lambda-zero"),
    ],
)
def test_wrong_numbers_are_refused(fields: Any, key: str) -> None:
    with refuses(ConfigError, key):
        Man(**fields)


def test_defaults_keep_the_last_local_loss() -> None:
    for blocks in (2, 3, 16):
        spec = replace(make_specs(Man())[0], index=blocks - 2, blocks=blocks)
        assert Man().lambdas(spec) == (5.0, 0.5)
    assert (Man().momentum, Man().lag, Man().start) == (0.995, 2, "next")


def test_one_block_is_backprop(micro_batch: MicroBatch) -> None:
    (spec, ours), (_, theirs) = make_block(Man(), 0, ()), make_block(Man(), 0, ())
    micro_batch.loss_scale, micro_batch.y = 1.0, ours.forward(micro_batch.x, ())
    ours.backward(Man().backward_pairs(spec, ours, micro_batch))
    cross_entropy(theirs.forward(micro_batch.x, ()), micro_batch.targets).backward()
    assert all(map(torch.equal, ours.gradients(), theirs.gradients()))
