"""MAN: the copies, what travels for them and what they follow, and the laws."""

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
from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.data.sampler import epoch_order
from dtrain.errors import DtrainError
from dtrain.models import load_model
from dtrain.models.layers import as_layers
from dtrain.models.shape_inference import infer_layers
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.reconstruction import ReconstructionHead
from dtrain.objectives.man import LAYER, EmaPair, Man, flat_parameters
from dtrain.planning.block_costs import BlockCosts, total_macs
from dtrain.planning.plan import make_plan
from dtrain.rng import seeded
from dtrain.schedules.actions import Point, Route
from dtrain.schedules.stream import Stream
from tests import tiny

D = torch.float64
SHAPE = (3, 8, 8)


@cache
def net(width: int = 4) -> Any:
    made = load_model("resnet", {"depth": 8, "width": width}, Path(), SHAPE, 3)
    return made, infer_layers(made, SHAPE, D)


def step(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def tasks(objective: Man, cuts: tuple[int, ...] = (2, 3)) -> list[BlockSpec]:
    """Return the tasks of a ResNet-8 that is cut at layers."""
    made, specs = net()
    prices = BlockCosts(
        specs, objective, made, BlockSpec.from_data(SHAPE, 3, has_raw_samples=True), 1
    )
    ends = itertools.pairwise((0, *cuts, len(specs)))
    return [prices.block_spec(b, len(cuts) + 1, i, j) for b, (i, j) in enumerate(ends)]


def block(objective: Man, index: int, cuts: tuple[int, ...] = (2, 3)) -> tuple[BlockSpec, Block]:
    """Return a block of it with its task, as seed 1 makes them, in float64."""
    task = tasks(objective, cuts)[index]
    ends = (0, *cuts, 5)
    layers = net()[0].build(range(ends[index], ends[index + 1]), 1, D)
    with seeded("heads", index):
        helper = objective.build_head(task)
    return task, Block(index, layers, helper and helper.to(D), step)


def pair(own: Block) -> EmaPair:
    assert isinstance(own.head, ReconstructionHead)
    assert isinstance(own.head.path, EmaPair)
    return own.head.path


@pytest.fixture
def live() -> MicroBatch:
    with seeded("batch"):
        x, y = torch.randn(6, 3, 8, 8, dtype=D), torch.randint(0, 3, (6,))
        return MicroBatch(x, x, y, 0.5, samples=x, raw_samples=torch.rand(6, 3, 8, 8, dtype=D))


# What the copies are


def test_both_copies_start_as_the_next_blocks_first_layer() -> None:
    """Bit for bit those that the neighbour itself starts from, in memory of their own."""
    (_, own), (_, above) = block(Man(), 0), block(Man(), 1)
    first = next(iter(above.layers.values()))
    for copy in (pair(own).learnt, pair(own).slow):
        assert torch.equal(flat_parameters(copy), flat_parameters(first))
    memory = [{p.data_ptr() for p in each.parameters()} for each in pair(own).children()]
    assert not memory[0] & memory[1]
    assert [p.requires_grad for p in pair(own).slow.parameters()] == [False] * 6
    assert all(p.requires_grad for p in pair(own).learnt.parameters())


@pytest.mark.parametrize("index", [0, 1])
def test_drawn_copies_start_apart(index: int) -> None:
    (_, own), (_, above) = block(Man(start="drawn"), index), block(Man(), index + 1)
    convolutions = [
        [each.weight for each in layer.modules() if isinstance(each, nn.Conv2d)]
        for layer in (*pair(own).children(), next(iter(above.layers.values())))
    ]
    for one, other in itertools.combinations(convolutions, 2):
        assert not any(map(torch.equal, one, other))
    wide = load_model("resnet", {"depth": 8, "width": 64}, Path(), SHAPE, 3)
    layer = EmaPair(wide.rebuild_layer(2, 0, D), redraw=True).learnt
    weight = next(layer.parameters())
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_copies_of_a_perceptrons_layer() -> None:
    mlp = load_model("mlp", {"widths": [9, 7, 6]}, Path(), (10,), 3)
    specs = infer_layers(mlp, (10,), D)
    for start in ("next", "drawn"):
        objective = Man(start=start)
        task = BlockCosts(specs, objective, mlp, BlockSpec.from_data((10,), 3), 1).block_spec(
            0, 2, 0, 1
        )
        with seeded("heads"):
            helper = objective.build_head(task)
        assert isinstance(helper, ReconstructionHead)
        first = flat_parameters(mlp.build([1], 1, torch.float32)["fc2"]).double()
        same = [
            torch.equal(flat_parameters(each).double(), first) for each in helper.path.children()
        ]
        assert same == [start == "next"] * 2
        assert helper.double()(torch.zeros(2, 9, dtype=D)).shape == (2, 3 + 10)


def test_the_loss_written_out(live: MicroBatch) -> None:
    """y = LB(h) + EMA(h), fed to both; h, not y, is streamed."""
    objective = Man(lambda_first=(2.0, 0.25))
    (task, own), (_, twin) = block(objective, 0), block(objective, 0)
    live.y = own.forward(live.x, ())
    [(loss, force)] = objective.backward_pairs(task, own, live)
    h = twin.forward(live.x, ())
    parts = twin.head
    assert isinstance(parts, ReconstructionHead)
    y = pair(twin).learnt(h) + pair(twin).slow(h)
    kept = binary_cross_entropy_with_logits(parts.decoder(y), live.raw_samples)
    told = cross_entropy(parts.head(y), live.targets)
    assert torch.equal(loss, torch.stack([0.25 * told, 2 * kept]).sum())
    assert float(force) == 0.5
    onward = Route(Point(0, "F"), Point(1, "F"), "activation")
    assert torch.equal(objective.make_message(onward, own, live), h)


def test_no_gradient_reaches_the_slow_copy_but_one_passes_through_it(live: MicroBatch) -> None:
    task, own = block(Man(), 0)
    before = flat_parameters(pair(own).slow)
    live.y = own.forward(live.x, ())
    pulls = Man().backward_pairs(task, own, live)
    own.backward(pulls)
    assert all(p.grad is None for p in pair(own).slow.parameters())
    assert all(p.grad is not None and p.grad.any() for p in pair(own).learnt.parameters())
    own.update()
    assert torch.equal(flat_parameters(pair(own).slow), before)
    assert not torch.equal(flat_parameters(pair(own).learnt), before)
    h = torch.randn(2, *task.output_shape, dtype=D, requires_grad=True)
    pair(own).slow(h).sum().backward()
    assert h.grad is not None
    assert h.grad.any()


def test_layers_that_work_in_place_do_not_write_to_what_both_are_fed() -> None:
    both = EmaPair(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)).double())
    x = torch.randn(3, 4, dtype=D)
    before = x.clone()
    torch.testing.assert_close(both(x), 2 * both.learnt[1](before.relu()))
    assert torch.equal(x, before)


# What they follow


def test_the_moving_average_is_its_closed_form() -> None:
    """m^t theta_0 + (1 - m) sum over i of m^(t - i) theta_i."""
    objective, t = Man(momentum=0.9), 12
    task, own = block(objective, 0)
    first = flat_parameters(pair(own).slow)
    with seeded("theta"):
        theta = torch.randn(t, len(first), dtype=D)
    for each in theta:
        objective.after_update(task, own, {LAYER: each})
    powers = 0.9 ** torch.arange(t - 1, -1, -1, dtype=D)
    wanted = 0.9**t * first + 0.1 * powers @ theta
    torch.testing.assert_close(flat_parameters(pair(own).slow), wanted, rtol=1e-12, atol=1e-14)


def test_it_rests_where_nothing_arrived_and_never_moves_with_momentum_1() -> None:
    task, own = block(Man(), 0)
    before = flat_parameters(pair(own).slow)
    Man().after_update(task, own, {})
    assert torch.equal(flat_parameters(pair(own).slow), before)
    rows = [(r.name, r.source.block, r.lag) for r in Man().routes(3, "train")]
    assert rows == [("activation", 0, 0), ("activation", 1, 0), (LAYER, 1, 2), (LAYER, 2, 2)]
    assert [r.name for r in Man(momentum=1.0).routes(3, "train")] == ["activation"] * 2
    assert LAYER not in [r.name for r in Man().routes(3, "predict")]


def test_batch_statistics_are_the_copies_own(live: MicroBatch) -> None:
    """They are made from what each copy is fed; the average leaves them alone."""
    task, own = block(Man(), 0)
    own.train()
    live.y = own.forward(live.x, ())
    Man().backward_pairs(task, own, live)
    norms = [
        [m for m in each.modules() if isinstance(m, nn.BatchNorm2d)]
        for each in pair(own).children()
    ]
    learnt, slow = (each[0].running_mean for each in norms)
    assert torch.equal(learnt, slow)
    assert slow.any()
    before = {name: tensor.clone() for name, tensor in pair(own).slow.named_buffers()}
    Man().after_update(task, own, {LAYER: torch.ones_like(flat_parameters(pair(own).slow))})
    for name, tensor in pair(own).slow.named_buffers():
        assert torch.equal(tensor, before[name])


# What travels


def test_the_message_is_the_parameters_of_one_layer() -> None:
    """unit1-1 and unit3-1 of width 4 by hand: two 3x3 convolutions and two norms."""
    made = tasks(Man(), (1, 3))
    down = [r for r in Man().routes(3, "train") if r.name == LAYER]
    weights = 2 * 9 * 4 * 4 + 2 * 8
    assert Man().message_spec(down[0], made, 0) == ((weights,), D)
    told = Man().make_message(down[0], block(Man(), 1, (1, 3))[1], None)
    assert (told.shape, told.dtype) == ((weights,), D)
    assert Man().message_spec(down[1], made, 0) == ((9 * 8 * 16 + 9 * 16 * 16 + 4 * 16,), D)


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_a_lag_of_two_makes_nobody_wait(lag: int) -> None:
    assert all(Stream().supports(r) for r in Man(lag=lag).routes(4, "train")) == (lag >= 2)


def test_the_average_over_a_run_follows_the_neighbours_weights() -> None:
    """What really arrives: weights of `lag` updates before, none in a segment's first two."""
    asked = tiny.run(objective={"name": "man", "momentum": 0.5}, micro_batches=1, mesh__stages=2)
    agreed = make_plan(asked, 2)

    def work(comm: Any) -> list[tuple[Tensor | None, Tensor | None]]:
        job = build_rank(agreed, comm)
        sequence = epoch_order(50, 3, 0, "full")
        batches = [agreed.batch_splitter.batch(sequence, each, 0) for each in range(4)]
        own = job.engine.blocks
        seen = [look(own)]
        for _ in job.engine.run(job.train_loader, batches, 0, 0):
            seen.append(look(own))
        return seen

    def look(own: dict[int, Block]) -> Any:
        """Return the slow copy in block 1, and the layer in block 2 that it follows."""
        slow = flat_parameters(pair(own[1]).slow) if 1 in own else None
        return slow, flat_parameters(next(iter(own[2].layers.values()))) if 2 in own else None

    agreed = replace(agreed, layout=replace(agreed.layout, place=(0, 0, 1)))
    # Ranks yield updates of their last blocks, so blocks 1 and 2 are told update by update.
    low, high = ranks(2, work, seed=0)
    slow, theta = [each for each, _ in low], [each for _, each in high]
    assert torch.equal(slow[0], slow[2])
    for update in (2, 3):
        wanted = 0.5 * slow[update] + 0.5 * theta[update - 1]
        torch.testing.assert_close(slow[update + 1], wanted)
        assert not torch.equal(slow[update + 1], slow[update])


def test_a_layer_without_parameters_is_told_of_and_runs() -> None:
    """Nothing travels but the empty message."""
    layers = [nn.Flatten, lambda: nn.Linear(10, 7), nn.ReLU, lambda: nn.Linear(7, 3)]
    made = as_layers(lambda: [(f"l{n}", each) for n, each in enumerate(layers)], "own")
    specs = infer_layers(made, (2, 5), D)
    prices = BlockCosts(specs, Man(), made, BlockSpec.from_data((2, 5), 3), 1)
    both = [prices.block_spec(0, 2, 0, 2), prices.block_spec(1, 2, 2, 4)]
    [told] = Man().warnings(both, 8)
    assert "block 1 begins with layer 'l2', which has no parameters" in told
    assert Man().warnings([prices.block_spec(0, 2, 0, 3), prices.block_spec(1, 2, 3, 4)], 8) == []
    [down] = [r for r in Man().routes(2, "train") if r.name == LAYER]
    other = Block(1, {"l2": nn.ReLU(), "l3": nn.Linear(7, 3)}, None, step)
    told_ = Man().make_message(down, other, None)
    assert (told_.shape, told_.dtype) == Man().message_spec(down, both, 0)


# Costs, refusals, laws


def test_both_copies_are_part_of_the_costs() -> None:
    made, specs = net()
    prices = BlockCosts(
        specs, Man(lambda_first=(0.0, 1.0), head="greedy"), made, BlockSpec.from_data(SHAPE, 3)
    )
    helper = prices.head_spec(prices.block_spec(0, 2, 0, 2))
    layer, head = specs[2], 16 * 3 // 2
    assert helper is not None
    assert helper.forward_macs == 2 * layer.forward_macs + head
    assert helper.input_gradient_macs == 2 * layer.input_gradient_macs + head
    assert total_macs(helper) < 2 * total_macs(layer) + 3 * head  # one copy has no weight gradients


@pytest.mark.parametrize("fields", [{"momentum": 1.1}, {"lag": -1}, {"lambda_last": (0.0, 0.0)}])
def test_wrong_numbers_are_refused(fields: Any) -> None:
    with pytest.raises(DtrainError, match=next(iter(fields)).replace("_", "-")):
        Man(**fields)


def test_defaults_keep_the_last_local_loss() -> None:
    for blocks in (2, 3, 16):
        task = replace(tasks(Man())[0], index=blocks - 2, blocks=blocks)
        assert Man().lambdas(task) == (5.0, 0.5)
    assert (Man().momentum, Man().lag, Man().start) == (0.995, 2, "next")


def test_one_block_is_backprop(live: MicroBatch) -> None:
    (task, ours), (_, theirs) = block(Man(), 0, ()), block(Man(), 0, ())
    live.loss_scale, live.y = 1.0, ours.forward(live.x, ())
    ours.backward(Man().backward_pairs(task, ours, live))
    cross_entropy(theirs.forward(live.x, ()), live.targets).backward()
    assert all(map(torch.equal, ours.gradients(), theirs.gradients()))
