"""The objective `dni`: synthetic gradients, and the gradients that they learn."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch, RowRandom
from dtrain.errors import ConfigError
from dtrain.objectives.base import GRADIENT
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.dni import Dni, Synthesiser
from dtrain.rng import seeded
from dtrain.schedules.actions import Point, Route
from dtrain.schedules.stream import Stream
from tests.refusals import refuses

D = torch.float64
WIDTHS = (5, 8, 7, 3)
ROWS = 6
GRADIENT_ROUTES = [Route(Point(b + 1, "B"), Point(b, "B"), GRADIENT, 2) for b in range(2)]


def make_spec(block: int) -> BlockSpec:
    return BlockSpec(block, 3, WIDTHS[block : block + 1], WIDTHS[block + 1 : block + 2], D, 3)


def make_blocks(objective: Dni) -> list[Block]:
    """Return three blocks whose synthesisers have random weights."""
    blocks = []
    for b in range(3):
        with seeded("layer", b):
            layer, head = nn.Linear(WIDTHS[b], WIDTHS[b + 1]), objective.make_head(make_spec(b))
            for parameter in [] if head is None else head.parameters():
                nn.init.normal_(parameter)
        layers = {f"fc{b}": nn.Sequential(layer, nn.Tanh()).to(D)}
        blocks.append(Block(b, layers, head and head.to(D), partial(torch.optim.SGD, lr=0.1)))
    return blocks


def batch(update: int = 0) -> tuple[Tensor, Tensor]:
    with seeded("batch", update):
        return torch.randn(ROWS, WIDTHS[0], dtype=D), torch.tensor([0, 1, 2, 0, 1, 1])


def make_micro_batch(
    block: Block, x: Tensor, y: Tensor, update: int = 0, rows: int = ROWS
) -> MicroBatch:
    """Return a micro-batch that is half of an update of one replica."""
    x = x.detach().requires_grad_()
    return MicroBatch(
        x,
        block.forward(x, ()),
        y,
        loss_scale=0.5,
        row_random=RowRandom(0, block.index, update, 2 * rows, 0, rows),
        rng_key=(update, 0, 0),
    )


class PerfectGuess(nn.Module):
    """Returns the true gradient of every sample."""

    def __init__(self, gradient: Tensor) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, _: Tensor) -> Tensor:
        return self.gradient


def test_a_perfect_synthesiser_is_backpropagation() -> None:
    """Whatever part of the update a micro-batch is."""
    objective, (x, y) = Dni(conditional=False, lag=0), batch()
    ours, theirs = make_blocks(objective), make_blocks(objective)
    outputs = [x]
    for block in theirs:
        outputs.append(block.forward(outputs[-1], ()))
        outputs[-1].retain_grad()
    (0.5 * cross_entropy(outputs[-1], y)).backward()
    h = x
    for b, block in enumerate(ours):
        if isinstance(block.head, Synthesiser):
            assert outputs[b + 1].grad is not None
            block.head.layers = nn.Sequential(PerfectGuess(outputs[b + 1].grad * 2 * ROWS))
        micro_batch = make_micro_batch(block, h, y)
        block.backward(objective.backward_pairs(make_spec(b), block, micro_batch))
        layers = (blocks[b].layers[f"fc{b}"] for blocks in (ours, theirs))
        for p, q in zip(*(layer.parameters() for layer in layers), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-16)
        if b:  # the message is the gradient that the previous block should have predicted
            message = objective.make_message(GRADIENT_ROUTES[b - 1], block, micro_batch)
            gradient = outputs[b].grad
            assert gradient is not None
            torch.testing.assert_close(message, gradient * 2 * ROWS, rtol=1e-13, atol=1e-15)
        h = micro_batch.y


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("conditional", [True, False])
def test_a_synthesiser_learns_the_squared_error_of_its_prediction(
    lag: int, conditional: bool
) -> None:
    """From the output and the labels of `lag` updates ago, and nothing else."""
    objective = Dni(conditional=conditional, lag=lag, hidden=1)
    block = make_blocks(objective)[0]
    synthesiser = block.head
    assert isinstance(synthesiser, Synthesiser)
    history = []
    for update in range(3):
        x, y = batch(update)
        micro_batch = make_micro_batch(block, x, (y + update) % 3, update)
        if update == 2 or not lag:
            micro_batch.received[GRADIENT] = torch.randn(ROWS, 8, dtype=D)
        history.append((micro_batch.y.detach(), micro_batch.targets))
        for parameter in block.trainable_parameters:
            parameter.grad = None
        block.backward(objective.backward_pairs(make_spec(0), block, micro_batch))
        assert len(synthesiser.cached_tensors) == min(update + 1, lag)
    h, labels = history[2 - lag]
    gradients = [p.grad for p in synthesiser.parameters()]
    inputs = torch.cat([h, one_hot(labels, 3).to(D)], 1) if conditional else h
    prediction = synthesiser.layers(inputs)
    loss = mse_loss(prediction, micro_batch.received[GRADIENT])
    expected = torch.autograd.grad(0.5 * loss, list(synthesiser.parameters()))
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-16)
    assert micro_batch.loss is not None
    torch.testing.assert_close(micro_batch.loss, loss.detach())
    cosine = cosine_similarity(prediction, micro_batch.received[GRADIENT]).mean().detach()
    torch.testing.assert_close(micro_batch.metrics["synthetic_cosine"], cosine)


def test_a_gradient_that_arrives_in_a_much_shorter_update_is_not_learnt() -> None:
    """At half the size it is: all rows of the past update have equal weight, over all replicas."""
    objective = Dni(lag=1)
    gradients = []
    for rows in (6, 3, 2):
        block = make_blocks(objective)[0]
        x, y = batch()
        block.backward(objective.backward_pairs(make_spec(0), block, make_micro_batch(block, x, y)))
        assert block.head is not None
        assert not any(p.grad is not None and p.grad.any() for p in block.head.parameters())
        micro_batch = make_micro_batch(block, x[:rows], y[:rows], 1, rows)
        micro_batch.received[GRADIENT] = torch.ones(ROWS, 8, dtype=D)
        block.backward(objective.backward_pairs(make_spec(0), block, micro_batch))
        gradients.append([p.grad for p in block.head.parameters()])
    assert all(map(torch.equal, gradients[0], gradients[1]))
    assert not any(gradient.any() for gradient in gradients[2])


def test_a_block_trains_no_other_and_its_regression_does_not_train_its_layers() -> None:
    """Law 7; and the gradient of a synthesiser's loss does not reach the layers."""
    objective, (x, y) = Dni(lag=0), batch()
    blocks = make_blocks(objective)
    for index, block in enumerate(blocks):
        micro_batch = make_micro_batch(block, x, y)
        micro_batch.received[GRADIENT] = torch.ones_like(micro_batch.y)
        pairs = objective.backward_pairs(make_spec(index), block, micro_batch)
        block.backward(pairs[1:])
        assert all(p.grad is None for layer in block.layers.values() for p in layer.parameters())
        assert index == 2 or micro_batch.x.grad is None
        block.backward(pairs[:1])
        for other_index, other in enumerate(blocks):
            has_gradient = index == other_index
            assert all((p.grad is not None) == has_gradient for p in other.trainable_parameters)
            for parameter in other.trainable_parameters:
                parameter.grad = None
        x = micro_batch.y


def test_one_block_is_ordinary_backprop() -> None:
    """Law 4, bit for bit."""
    x, y = batch()
    alone = BlockSpec(0, 1, (5,), (8,), D, 8)
    assert Dni().make_head(alone) is None
    with seeded("alone"):
        layer = nn.Linear(5, 8).to(D)
    block = Block(0, {"fc": layer}, None, partial(torch.optim.SGD, lr=0.1))
    block.backward(Dni().backward_pairs(alone, block, MicroBatch(x, block.forward(x, ()), y)))
    gradients = [gradient.clone() for gradient in block.gradients()]
    layer.zero_grad()
    cross_entropy(layer(x), y).backward()
    assert all(map(torch.equal, gradients, block.gradients()))


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("outputs", [(7,), (4, 5, 6), (3, 4)])
def test_predictions_start_at_zero_and_have_the_outputs_shape(
    outputs: tuple[int, ...], hidden: int
) -> None:
    synthesiser = Dni(hidden=hidden).build_head(BlockSpec(0, 2, (5,), outputs, D, 3))
    assert isinstance(synthesiser, Synthesiser)
    y, labels = torch.randn(2, *outputs), torch.tensor([2, 0])
    assert torch.equal(synthesiser(y, labels), torch.zeros(2, *outputs))
    for parameter in synthesiser.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(synthesiser(y, labels), synthesiser(y, torch.ones_like(labels)))
    kind = nn.Conv2d if len(outputs) == 3 else nn.Linear
    assert sum(isinstance(module, kind) for module in synthesiser.modules()) == hidden + 1


def test_gradients_are_late_enough_to_stream() -> None:
    assert [Dni(lag=lag).default_schedule for lag in (0, 1, 2, 3)] == ["1f1b"] * 2 + ["stream"] * 2
    assert all(map(Stream().supports, Dni().routes(5, "train")))
    assert not all(map(Stream().supports, Dni(lag=1).routes(5, "train")))
    assert list(Dni().routes(3, "train")[2:]) == GRADIENT_ROUTES
    assert not any(route.name == GRADIENT for route in Dni().routes(3, "predict"))


@pytest.mark.parametrize("field", ["lag", "hidden"])
def test_wrong_fields_are_refused(field: str) -> None:
    with refuses(ConfigError, f"objective.{field}-negative"):
        Dni(**{field: -1})
