"""The objective `ccl`: forward and feedback network in every block, and delayed codes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, elu, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.ccl import Ccl, FeedbackLayer
from dtrain.rng import seeded
from dtrain.schedules.actions import Point, Route
from dtrain.schedules.stream import Stream
from tests.refusals import refuses

D = torch.float64
WIDTHS = (5, 8, 7, 6, 3)
ROWS = 6


def make_spec(block: int, blocks: int = 4) -> BlockSpec:
    shapes = [WIDTHS[i : i + 1] for i in (block, block + 1, block + 2)]
    return BlockSpec(block, blocks, *shapes[:2], D, 3, next_output_shape=shapes[2])


def make_block(objective: Ccl, block: int) -> Block:
    """Return a block of one layer; the codes are random except in the last but one block."""
    with seeded("layer", block):
        layer = nn.Linear(WIDTHS[block], WIDTHS[block + 1]).to(D)
        head = objective.make_head(make_spec(block))
        if isinstance(head, FeedbackLayer) and block < 2:
            head.codes.normal_()
    return Block(
        block, {f"fc{block}": layer}, head and head.to(D), partial(torch.optim.SGD, lr=0.1)
    )


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(ROWS, WIDTHS[0], dtype=D), torch.tensor([0, 1, 2, 0, 1, 1])


def test_the_product_of_both_networks_has_bilinear_gradients(batch: tuple[Tensor, Tensor]) -> None:
    """With the error delta = d loss / d scores: d a = delta c, d c = delta^T a."""
    objective, (x, y) = Ccl(scale=0.25, psi="elu"), batch
    block = make_block(objective, 0)
    feedback = block.head
    assert isinstance(feedback, FeedbackLayer)
    codes = feedback.codes.clone()
    micro_batch = MicroBatch(x, block.forward(x, ()), y, loss_scale=0.5)
    micro_batch.y.retain_grad()
    block.backward(objective.backward_pairs(make_spec(0), block, micro_batch))
    a, pre_activation = micro_batch.y.detach(), codes @ feedback.layer.weight.detach().T
    c = elu(pre_activation)
    error = a @ c.T - one_hot(y, 3)
    delta = 0.5 * 0.25 * 256 / 8 * 2 / error.numel() * error
    assert micro_batch.loss is not None
    assert micro_batch.y.grad is not None
    scale = 0.25 * 256 / 8
    torch.testing.assert_close(micro_batch.loss, scale * error.square().mean(), rtol=1e-14, atol=0)
    torch.testing.assert_close(micro_batch.y.grad, delta @ c, rtol=1e-14, atol=1e-15)
    slope = torch.where(pre_activation > 0, 1.0, pre_activation.exp())
    expected = (delta.T @ a * slope).T @ codes
    torch.testing.assert_close(feedback.layer.weight.grad, expected, rtol=1e-13, atol=1e-15)


def test_both_networks_learn_in_their_own_block_alone(batch: tuple[Tensor, Tensor]) -> None:
    """Law 7 for the forward network; for the feedback network: codes come without a graph."""
    objective, (x, y) = Ccl(), batch
    blocks = [make_block(objective, b) for b in range(4)]
    for index, block in enumerate(blocks):
        micro_batch = MicroBatch(x.detach(), block.forward(x.detach(), ()), y)
        block.backward(objective.backward_pairs(make_spec(index), block, micro_batch))
        for other_index, other in enumerate(blocks):
            for name, parameter in other.parameters.items():
                assert (parameter.grad is not None) == (index == other_index), name
                parameter.grad = None
        x = micro_batch.y
    route = objective.routes(4, "train")[-1]
    codes = objective.make_message(route, blocks[route.source.block], None)
    assert not codes.requires_grad
    assert codes.shape == objective.message_spec(route, [make_spec(b) for b in range(4)], 0)[0]
    receiver = blocks[route.target.block]
    objective.after_update(make_spec(route.target.block), receiver, {"codes": codes})
    assert isinstance(receiver.head, FeedbackLayer)
    assert torch.equal(receiver.head.codes, codes)
    assert receiver.head.codes.data_ptr() != codes.data_ptr()


def test_a_code_is_the_composition_of_all_later_feedback_layers() -> None:
    """c_k = psi(V_k psi(V_{k+1} ... onehot))."""
    objective = Ccl()
    feedback_layers = [make_block(objective, b).head for b in range(3)]
    expected = torch.eye(3, dtype=D)
    for earlier, later in ((1, 2), (0, 1)):
        target, source = feedback_layers[earlier], feedback_layers[later]
        assert isinstance(target, FeedbackLayer)
        assert isinstance(source, FeedbackLayer)
        expected = elu(expected @ source.layer.weight.T)
        torch.testing.assert_close(source.make_codes(), expected)
        target.codes.copy_(source.make_codes().detach())


def test_without_codes_nothing_is_learnt_but_the_last_but_one_block_has_its_own(
    batch: tuple[Tensor, Tensor],
) -> None:
    objective, (x, y) = Ccl(), batch
    heads = [objective.make_head(make_spec(b)) for b in range(4)]
    assert heads[3] is None
    initial = [head.codes for head in heads if isinstance(head, FeedbackLayer)]
    assert [bool(codes.any()) for codes in initial] == [False, False, True]
    assert torch.equal(initial[2], torch.eye(3))
    block = make_block(objective, 0)
    assert isinstance(block.head, FeedbackLayer)
    block.head.codes.zero_()
    micro_batch = MicroBatch(x, block.forward(x, ()), y)
    block.backward(objective.backward_pairs(make_spec(0), block, micro_batch))
    assert not any(gradient.any() for gradient in block.gradients())


def test_samples_near_their_target_are_not_learnt(batch: tuple[Tensor, Tensor]) -> None:
    """If a sample's own score is within `filter` of 1, its gradient is 0."""
    x, y = batch
    block = make_block(Ccl(), 0)
    assert block.head is not None
    gaps = (block.head(block.forward(x, ())).detach()[range(ROWS), y] - 1).abs()
    limit = float(gaps.median()) + 1e-9
    micro_batch = MicroBatch(x, block.forward(x, ()), y)
    micro_batch.y.retain_grad()
    block.backward(Ccl(filter=limit).backward_pairs(make_spec(0), block, micro_batch))
    assert micro_batch.y.grad is not None
    assert torch.equal(micro_batch.y.grad.abs().sum(1) > 0, gaps >= limit)


def test_one_block_is_ordinary_backprop(batch: tuple[Tensor, Tensor]) -> None:
    """Law 4, bit for bit."""
    x, y = batch
    alone = BlockSpec(0, 1, (5,), (8,), D, 8)
    assert Ccl().make_head(alone) is None
    with seeded("alone"):
        layer = nn.Linear(5, 8).to(D)
    block = Block(0, {"fc": layer}, None, partial(torch.optim.SGD, lr=0.1))
    block.backward(Ccl().backward_pairs(alone, block, MicroBatch(x, block.forward(x, ()), y)))
    gradients = [gradient.clone() for gradient in block.gradients()]
    layer.zero_grad()
    cross_entropy(layer(x), y).backward()
    assert all(map(torch.equal, gradients, block.gradients()))


def test_codes_are_late_enough_to_stream() -> None:
    assert [Ccl(lag=lag).default_schedule for lag in (0, 1, 2, 3)] == ["drained"] * 2 + [
        "stream"
    ] * 2
    assert all(map(Stream().supports, Ccl().routes(5, "train")))
    assert not all(map(Stream().supports, Ccl(lag=1).routes(5, "train")))
    codes = [Route(Point(b + 1, "U"), Point(b, "U"), "codes", 2) for b in (1, 0)]
    assert list(Ccl().routes(4, "train")[3:]) == codes
    assert not any(route.name == "codes" for route in Ccl().routes(4, "predict"))


def test_images_are_averaged_to_few_numbers() -> None:
    """16 x 32 x 32 numbers become 16 x 4 x 4, and 64 x 8 x 8 become 64 x 2 x 2."""
    spec = BlockSpec(0, 3, (3, 32, 32), (16, 32, 32), D, 10, next_output_shape=(64, 8, 8))
    head = Ccl().build_head(spec)
    assert isinstance(head, FeedbackLayer)
    assert head.layer.weight.shape == (256, 256)
    y = torch.randn(2, 16, 32, 32)
    flat = y.view(2, 16, 4, 8, 4, 8).mean((3, 5)).flatten(1)
    head.codes.normal_()
    torch.testing.assert_close(head(y), flat @ head.make_codes().T)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"lag": -1}, "objective.lag-negative"),
        ({"scale": 0}, "objective.scale-not-positive"),
        ({"filter": -0.1}, "objective.filter-negative"),
        ({"features": 0}, "objective.features-too-small"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        Ccl(**fields)
