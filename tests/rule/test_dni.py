"""The objective `dni`: guesses of gradients, and what they are held against."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch, RowRandom
from dtrain.errors import DtrainError
from dtrain.objectives.base import GRADIENT
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.dni import Dni, Synthesiser
from dtrain.rng import seeded
from dtrain.schedules.actions import Point, Route
from dtrain.schedules.stream import Stream

D = torch.float64
WIDTHS = (5, 8, 7, 3)
ROWS = 6
BACK = [Route(Point(b + 1, "B"), Point(b, "B"), GRADIENT, 2) for b in range(2)]


def task(block: int) -> BlockSpec:
    return BlockSpec(block, 3, WIDTHS[block : block + 1], WIDTHS[block + 1 : block + 2], D, 3)


def chain(objective: Dni) -> list[Block]:
    """Return three blocks; their synthesisers guess something."""
    blocks = []
    for b in range(3):
        with seeded("layer", b):
            layer, helper = nn.Linear(WIDTHS[b], WIDTHS[b + 1]), objective.build_head(task(b))
            for each in [] if helper is None else helper.parameters():
                nn.init.normal_(each)
        layers = {f"fc{b}": nn.Sequential(layer, nn.Tanh()).to(D)}
        helper = None if helper is None else helper.to(D)
        blocks.append(Block(b, layers, helper, partial(torch.optim.SGD, lr=0.1)))
    return blocks


def batch(update: int = 0) -> tuple[Tensor, Tensor]:
    with seeded("batch", update):
        return torch.randn(ROWS, WIDTHS[0], dtype=D), torch.tensor([0, 1, 2, 0, 1, 1])


def live(block: Block, x: Tensor, y: Tensor, update: int = 0, rows: int = ROWS) -> MicroBatch:
    """Return a micro-batch that is half of an update of one replica."""
    x = x.detach().requires_grad_()
    draws, draw = RowRandom(0, block.index, update, 2 * rows, 0, rows), (update, 0, 0)
    return MicroBatch(x, block.forward(x, ()), y, loss_scale=0.5, row_random=draws, rng_key=draw)


class Known(nn.Module):
    """Knows the gradient of every sample."""

    def __init__(self, gradient: Tensor) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, _: Tensor) -> Tensor:
        return self.gradient


def test_a_perfect_synthesiser_is_backpropagation() -> None:
    """Whatever share of the update a micro-batch is."""
    objective, (x, y) = Dni(conditional=False, lag=0), batch()
    ours, theirs = chain(objective), chain(objective)
    outs = [x]
    for block in theirs:
        outs.append(block.forward(outs[-1], ()))
        outs[-1].retain_grad()
    (0.5 * cross_entropy(outs[-1], y)).backward()
    h = x
    for b, block in enumerate(ours):
        if isinstance(block.head, Synthesiser):
            assert outs[b + 1].grad is not None
            block.head.layers = nn.Sequential(Known(outs[b + 1].grad * 2 * ROWS))
        each = live(block, h, y)
        block.backward(objective.backward_pairs(task(b), block, each))
        for mine, wanted in zip(*(list(z[b].layers.values()) for z in (ours, theirs)), strict=True):
            for p, q in zip(mine.parameters(), wanted.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-16)
        if b:  # and what it tells is what the block below should have guessed
            told = objective.make_message(BACK[b - 1], block, each)
            below = outs[b].grad
            assert below is not None
            torch.testing.assert_close(told, below * 2 * ROWS, rtol=1e-13, atol=1e-15)
        h = each.y


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("conditional", [True, False])
def test_a_synthesiser_learns_the_squared_error_of_its_guess(lag: int, conditional: bool) -> None:
    """Of the output and the labels of `lag` updates ago, and of nothing else."""
    objective = Dni(conditional=conditional, lag=lag, hidden=1)
    block = chain(objective)[0]
    helper = block.head
    assert isinstance(helper, Synthesiser)
    seen = []
    for update in range(3):
        x, y = batch(update)
        each = live(block, x, (y + update) % 3, update)
        if update == 2 or not lag:
            each.received[GRADIENT] = torch.randn(ROWS, 8, dtype=D)
        seen.append((each.y.detach(), each.targets))
        for parameter in block.trainable_parameters:
            parameter.grad = None
        block.backward(objective.backward_pairs(task(0), block, each))
        assert len(helper.cached_tensors) == min(update + 1, lag)
    h, labels = seen[2 - lag]
    grads = [p.grad for p in helper.parameters()]
    inputs = torch.cat([h, one_hot(labels, 3).to(D)], 1) if conditional else h
    guess = helper.layers(inputs)
    loss = mse_loss(guess, each.received[GRADIENT])
    wanted = torch.autograd.grad(0.5 * loss, list(helper.parameters()))
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-16)
    assert each.loss is not None
    torch.testing.assert_close(each.loss, loss.detach())
    cosine = cosine_similarity(guess, each.received[GRADIENT]).mean().detach()
    torch.testing.assert_close(each.metrics["synthetic_cosine"], cosine)


def test_what_comes_to_a_much_shorter_update_is_not_learnt() -> None:
    """To one half of it, it is: each row of the past update counts alike, over all replicas."""
    objective = Dni(lag=1)
    found = []
    for rows in (6, 3, 2):
        block = chain(objective)[0]
        x, y = batch()
        block.backward(objective.backward_pairs(task(0), block, live(block, x, y)))
        assert block.head is not None
        assert all(p.grad is None for p in block.head.parameters())
        each = live(block, x[:rows], y[:rows], 1, rows)
        each.received[GRADIENT] = torch.ones(ROWS, 8, dtype=D)
        block.backward(objective.backward_pairs(task(0), block, each))
        found.append([p.grad for p in block.head.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert all(each is None for each in found[2])


def test_a_block_moves_no_other_and_its_guess_is_not_its_regression() -> None:
    """Law 7; and the pull of a synthesiser does not reach the layers."""
    objective, (x, y) = Dni(lag=0), batch()
    blocks = chain(objective)
    for own, learner in enumerate(blocks):
        each = live(learner, x, y)
        each.received[GRADIENT] = torch.ones_like(each.y)
        pulls = objective.backward_pairs(task(own), learner, each)
        learner.backward(pulls[1:])
        assert all(p.grad is None for layer in learner.layers.values() for p in layer.parameters())
        assert own == 2 or each.x.grad is None
        learner.backward(pulls[:1])
        for other, block in enumerate(blocks):
            assert all((p.grad is not None) == (own == other) for p in block.trainable_parameters)
            for parameter in block.trainable_parameters:
                parameter.grad = None
        x = each.y


def test_one_block_is_ordinary_backprop() -> None:
    """Law 4, bit for bit."""
    x, y = batch()
    alone = BlockSpec(0, 1, (5,), (8,), D, 8)
    assert Dni().build_head(alone) is None
    with seeded("alone"):
        layer = nn.Linear(5, 8).to(D)
    block = Block(0, {"fc": layer}, None, partial(torch.optim.SGD, lr=0.1))
    block.backward(Dni().backward_pairs(alone, block, MicroBatch(x, block.forward(x, ()), y)))
    found = [each.clone() for each in block.gradients()]
    layer.zero_grad()
    cross_entropy(layer(x), y).backward()
    assert all(torch.equal(a, b) for a, b in zip(found, block.gradients(), strict=True))


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("outputs", [(7,), (4, 5, 6), (3, 4)])
def test_guesses_start_at_zero_and_have_the_outputs_shape(
    outputs: tuple[int, ...], hidden: int
) -> None:
    helper = Dni(hidden=hidden).build_head(BlockSpec(0, 2, (5,), outputs, D, 3))
    assert isinstance(helper, Synthesiser)
    y, labels = torch.randn(2, *outputs), torch.tensor([2, 0])
    assert torch.equal(helper(y, labels), torch.zeros(2, *outputs))
    for parameter in helper.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(helper(y, labels), helper(y, torch.ones_like(labels)))
    kind = nn.Conv2d if len(outputs) == 3 else nn.Linear
    assert sum(isinstance(each, kind) for each in helper.modules()) == hidden + 1


def test_gradients_are_late_enough_to_stream() -> None:
    assert [Dni(lag=lag).default_schedule for lag in (0, 1, 2, 3)] == ["1f1b"] * 2 + ["stream"] * 2
    assert all(map(Stream().supports, Dni().routes(5, "train")))
    assert not all(map(Stream().supports, Dni(lag=1).routes(5, "train")))
    assert list(Dni().routes(3, "train")[2:]) == BACK
    assert not any(route.name == GRADIENT for route in Dni().routes(3, "predict"))


@pytest.mark.parametrize("wrong", ["lag", "hidden"])
def test_wrong_fields_are_refused(wrong: str) -> None:
    with pytest.raises(DtrainError, match=f"{wrong} = -1"):
        Dni(**{wrong: -1})
