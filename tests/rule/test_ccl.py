"""The objective `ccl`: two nets that meet in every block, and codes that are not waited for."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, elu, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import DtrainError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.ccl import Ccl, FeedbackLayer
from dtrain.rng import seeded
from dtrain.schedules.actions import Point, Route
from dtrain.schedules.stream import Stream

D = torch.float64
WIDTHS = (5, 8, 7, 6, 3)
ROWS = 6


def task(block: int, blocks: int = 4) -> BlockSpec:
    above = WIDTHS[block + 2 : block + 3]
    return BlockSpec(block, blocks, WIDTHS[block : block + 1], WIDTHS[block + 1 : block + 2], D, 3,
                next_output_shape=above)  # fmt: skip


def made(objective: Ccl, block: int) -> Block:
    """Return a block of one layer; the codes of all but the top are drawn."""
    with seeded("layer", block):
        layer = nn.Linear(WIDTHS[block], WIDTHS[block + 1]).to(D)
        helper = objective.build_head(task(block))
        if isinstance(helper, FeedbackLayer) and block < 2:
            helper.codes.normal_()
    helper = None if helper is None else helper.to(D)
    return Block(block, {f"fc{block}": layer}, helper, partial(torch.optim.SGD, lr=0.1))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(ROWS, WIDTHS[0], dtype=D), torch.tensor([0, 1, 2, 0, 1, 1])


def test_the_product_of_both_nets_has_bilinear_gradients(batch: tuple[Tensor, Tensor]) -> None:
    """With the error delta = d loss / d scores: d a = delta c, d c = delta^T a."""
    objective, (x, y) = Ccl(scale=0.25, psi="elu"), batch
    block = made(objective, 0)
    mirror = block.head
    assert isinstance(mirror, FeedbackLayer)
    codes = mirror.codes.clone()
    live = MicroBatch(x, block.forward(x, ()), y, loss_scale=0.5)
    live.y.retain_grad()
    block.backward(objective.backward_pairs(task(0), block, live))
    a, sums = live.y.detach(), codes @ mirror.layer.weight.detach().T
    c = elu(sums)
    error = a @ c.T - one_hot(y, 3)
    delta = 0.5 * 0.25 * 256 / 8 * 2 / error.numel() * error
    assert live.loss is not None
    assert live.y.grad is not None
    scale = 0.25 * 256 / 8
    torch.testing.assert_close(live.loss, scale * error.square().mean(), rtol=1e-14, atol=0)
    torch.testing.assert_close(live.y.grad, delta @ c, rtol=1e-14, atol=1e-15)
    slope = torch.where(sums > 0, 1.0, sums.exp())
    wanted = (delta.T @ a * slope).T @ codes
    torch.testing.assert_close(mirror.layer.weight.grad, wanted, rtol=1e-13, atol=1e-15)


def test_both_nets_learn_in_their_own_block_alone(batch: tuple[Tensor, Tensor]) -> None:
    """Law 7 for the forward net; the feedback net's is that codes come without a graph."""
    objective, (x, y) = Ccl(), batch
    blocks = [made(objective, b) for b in range(4)]
    for own, learner in enumerate(blocks):
        live = MicroBatch(x.detach(), learner.forward(x.detach(), ()), y)
        learner.backward(objective.backward_pairs(task(own), learner, live))
        for other, each in enumerate(blocks):
            for name, parameter in each.parameters.items():
                assert (parameter.grad is not None) == (own == other), name
                parameter.grad = None
        x = live.y
    route = objective.routes(4, "train")[-1]
    above = blocks[route.source.block]
    codes = objective.make_message(route, above, None)
    assert not codes.requires_grad
    assert codes.shape == objective.message_spec(route, [task(b) for b in range(4)], 0)[0]
    below = blocks[route.target.block]
    objective.after_update(task(route.target.block), below, {"codes": codes})
    assert isinstance(below.head, FeedbackLayer)
    assert torch.equal(below.head.codes, codes)
    assert below.head.codes.data_ptr() != codes.data_ptr()


def test_a_code_is_the_feedback_layers_of_all_blocks_above() -> None:
    """c_k = psi(V_k psi(V_{k+1} ... onehot)), as it is handed down."""
    objective = Ccl()
    mirrors = [made(objective, b).head for b in range(3)]
    wanted = torch.eye(3, dtype=D)
    for below, above in ((1, 2), (0, 1)):
        lower, upper = mirrors[below], mirrors[above]
        assert isinstance(lower, FeedbackLayer)
        assert isinstance(upper, FeedbackLayer)
        wanted = elu(wanted @ upper.layer.weight.T)
        torch.testing.assert_close(upper.make_codes(), wanted)
        lower.codes.copy_(upper.make_codes().detach())


def test_no_codes_teach_nothing_but_the_top_has_its_own(batch: tuple[Tensor, Tensor]) -> None:
    objective, (x, y) = Ccl(), batch
    helpers = [objective.build_head(task(b)) for b in range(4)]
    assert helpers[3] is None
    zeros = [m.codes for m in helpers if isinstance(m, FeedbackLayer)]
    assert [bool(codes.any()) for codes in zeros] == [False, False, True]
    assert torch.equal(zeros[2], torch.eye(3))
    block = made(objective, 0)
    assert isinstance(block.head, FeedbackLayer)
    block.head.codes.zero_()
    live = MicroBatch(x, block.forward(x, ()), y)
    block.backward(objective.backward_pairs(task(0), block, live))
    assert not any(each.any() for each in block.gradients())


def test_samples_near_their_target_are_not_learnt(batch: tuple[Tensor, Tensor]) -> None:
    """Where a sample's own score is within `filter` of 1 nothing pulls it."""
    x, y = batch
    block = made(Ccl(), 0)
    assert block.head is not None
    near = (block.head(block.forward(x, ())).detach()[range(ROWS), y] - 1).abs()
    limit = float(near.median()) + 1e-9
    live = MicroBatch(x, block.forward(x, ()), y)
    live.y.retain_grad()
    block.backward(Ccl(filter=limit).backward_pairs(task(0), block, live))
    assert live.y.grad is not None
    assert torch.equal(live.y.grad.abs().sum(1) > 0, near >= limit)


def test_one_block_is_ordinary_backprop(batch: tuple[Tensor, Tensor]) -> None:
    """Law 4, bit for bit."""
    x, y = batch[0], batch[1]
    alone = BlockSpec(0, 1, (5,), (8,), D, 8)
    assert Ccl().build_head(alone) is None
    with seeded("alone"):
        layer = nn.Linear(5, 8).to(D)
    block = Block(0, {"fc": layer}, None, partial(torch.optim.SGD, lr=0.1))
    block.backward(Ccl().backward_pairs(alone, block, MicroBatch(x, block.forward(x, ()), y)))
    found = [each.clone() for each in block.gradients()]
    layer.zero_grad()
    cross_entropy(layer(x), y).backward()
    assert all(torch.equal(a, b) for a, b in zip(found, block.gradients(), strict=True))


def test_codes_are_late_enough_to_stream() -> None:
    assert [Ccl(lag=lag).default_schedule for lag in (0, 1, 2, 3)] == ["drained"] * 2 + [
        "stream"
    ] * 2
    assert all(map(Stream().supports, Ccl().routes(5, "train")))
    assert not all(map(Stream().supports, Ccl(lag=1).routes(5, "train")))
    back = [Route(Point(b + 1, "U"), Point(b, "U"), "codes", 2) for b in (1, 0)]
    assert list(Ccl().routes(4, "train")[3:]) == back
    assert not any(route.name == "codes" for route in Ccl().routes(4, "predict"))


def test_images_are_averaged_to_few_numbers() -> None:
    """16 x 32 x 32 numbers become 16 x 4 x 4, 64 x 8 x 8 become 64 x 2 x 2."""
    where = BlockSpec(0, 3, (3, 32, 32), (16, 32, 32), D, 10, next_output_shape=(64, 8, 8))
    helper = Ccl().build_head(where)
    assert isinstance(helper, FeedbackLayer)
    assert helper.layer.weight.shape == (256, 256)
    y = torch.randn(2, 16, 32, 32)
    flat = y.view(2, 16, 4, 8, 4, 8).mean((3, 5)).flatten(1)
    helper.codes.normal_()
    torch.testing.assert_close(helper(y), flat @ helper.make_codes().T)


@pytest.mark.parametrize("wrong", [{"lag": -1}, {"scale": 0}, {"filter": -0.1}, {"features": 0}])
def test_wrong_fields_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DtrainError, match=f"{next(iter(wrong))} = "):
        Ccl(**wrong)
