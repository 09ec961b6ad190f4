"""Laws of one block and of objectives, against autograd in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.block.optimizer import OptimizerSettings
from dtrain.objectives.backprop import Backprop
from dtrain.objectives.base import GRADIENT, Objective, forward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.mono_forward import MonoForward
from dtrain.rng import seeded

D = torch.float64
sgd = OptimizerSettings("sgd", {"lr": 0.1})


def block_spec(index: int, blocks: int, outputs: int) -> BlockSpec:
    return BlockSpec(index, blocks, (4,), (outputs,), D, 3)


def make_block(objective: Objective, spec: BlockSpec, *layers: nn.Module) -> Block:
    head = objective.make_head(spec)
    named = {f"l{spec.index}{number}": layer.to(D) for number, layer in enumerate(layers)}
    return Block(spec.index, named, head and head.to(D), sgd)


def forward(block: Block, x: Tensor, y: Tensor, loss_scale: float = 1.0) -> MicroBatch:
    """Return the micro-batch after the block's forward."""
    x = x.detach().requires_grad_()
    return MicroBatch(x, block.forward(x, (0, 0, 0)), y, loss_scale)


def backward(objective: Objective, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> None:
    block.backward(objective.backward_pairs(spec, block, micro_batch))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(9, 4, dtype=D), torch.randint(0, 3, (9,))


@pytest.mark.parametrize("kind", [Backprop, MonoForward])
def test_one_block_is_ordinary_backprop(
    kind: Callable[[], Objective], batch: tuple[Tensor, Tensor]
) -> None:
    """Law 4, bit for bit, over several updates; `test_isolation` has all objectives."""
    x, y = batch
    with seeded("net"):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(D)
    with seeded("net"):
        layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    objective, spec = kind(), block_spec(0, 1, 3)
    block = make_block(objective, spec, *layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        backward(objective, spec, block, forward(block, x, y))
        block.update()
    for theirs, ours in zip(model.parameters(), block.parameters.values(), strict=True):
        assert torch.equal(theirs, ours)


def test_the_gradients_of_mono_forward_are_the_closed_form(batch: tuple[Tensor, Tensor]) -> None:
    """With delta = (softmax(G) - Y) / B: dM = delta^T a, dW = ((delta M) * phi'(z))^T h."""
    x, y = batch
    objective, spec = MonoForward(), block_spec(0, 2, 5)
    block = make_block(objective, spec, nn.Linear(4, 5), nn.Tanh())
    backward(objective, spec, block, forward(block, x, y))
    weight, bias, head = (parameter.detach() for parameter in block.parameters.values())
    a = torch.tanh(x @ weight.T + bias)
    delta = ((a @ head.T).softmax(1) - torch.eye(3, dtype=D)[y]) / len(x)
    delta_z = (delta @ head) * (1 - a**2)
    dw, db, dm = block.gradients()
    assert list(block.parameters) == ["l00.weight", "l00.bias", "heads.0.1.weight"]
    torch.testing.assert_close(dm, delta.T @ a, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(dw, delta_z.T @ x, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(db, delta_z.sum(0), rtol=1e-13, atol=1e-15)


def test_blocks_of_backprop_have_the_gradients_of_the_whole_net(
    batch: tuple[Tensor, Tensor],
) -> None:
    x, y = batch
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).to(D)
    cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    objective = Backprop()
    specs = [block_spec(0, 3, 5), block_spec(1, 3, 4), block_spec(2, 3, 3)]
    parts = [layers[:2], layers[2:4], layers[4:]]
    blocks = [make_block(objective, spec, *part) for spec, part in zip(specs, parts, strict=True)]
    micro_batches: list[MicroBatch] = []
    for block in blocks:
        micro_batches.append(forward(block, micro_batches[-1].y if micro_batches else x, y))
    gradient: Tensor | None = None
    for index in (2, 1, 0):
        micro_batch = micro_batches[index]
        micro_batch.received = {} if gradient is None else {GRADIENT: gradient}
        backward(objective, specs[index], blocks[index], micro_batch)
        gradient = micro_batch.x.grad
    gradients = [gradient for block in blocks for gradient in block.gradients()]
    for theirs, ours in zip(expected, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", [Backprop, MonoForward])
def test_a_loss_is_scaled_once(kind: Callable[[], Objective], batch: tuple[Tensor, Tensor]) -> None:
    """Law 3: unequal micro-batches add up to the gradient of the mean over all samples."""
    x, y = batch
    objective, spec = kind(), block_spec(1, 2, 3)
    block = make_block(objective, spec, nn.Linear(4, 3))
    backward(objective, spec, block, forward(block, x, y))
    expected = [gradient.clone() for gradient in block.gradients()]
    block.update()
    again = make_block(objective, spec, *block.layers.values())
    with torch.no_grad():
        for parameter, gradient in zip(again.parameters.values(), expected, strict=True):
            parameter += 0.1 * gradient
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        micro_batch = forward(again, x[part], y[part], len(x[part]) / len(x))
        backward(objective, spec, again, micro_batch)
    for theirs, ours in zip(expected, again.gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_no_loss_reaches_into_another_block(batch: tuple[Tensor, Tensor]) -> None:
    """Law 7: the backward of a local objective in block 1 gives block 0 no gradient."""
    x, y = batch
    objective, first_spec, second_spec = MonoForward(), block_spec(0, 2, 5), block_spec(1, 2, 3)
    first = make_block(objective, first_spec, nn.Linear(4, 5))
    second = make_block(objective, second_spec, nn.Linear(5, 3))
    message = objective.make_message(forward_routes(2)[0], first, forward(first, x, y))
    assert not message.requires_grad
    micro_batch = MicroBatch(message, second.forward(message, ()), y)
    backward(objective, second_spec, second, micro_batch)
    assert all(parameter.grad is None for parameter in first.parameters.values())
    assert all(parameter.grad is not None for parameter in second.parameters.values())


def test_random_numbers_depend_on_layer_and_micro_batch_not_on_the_cut() -> None:
    layers = {"a": nn.Dropout(0.5), "b": nn.Linear(6, 6).to(D), "c": nn.Dropout(0.5)}
    x = torch.ones(4, 6, dtype=D)
    whole = Block(0, layers, None, sgd, seed=5)
    first = Block(0, {"a": layers["a"]}, None, sgd, seed=5)
    rest = Block(1, {name: layers[name] for name in "bc"}, None, sgd, seed=5)
    state = torch.get_rng_state()
    output = whole.forward(x, (7, 1, 0))
    torch.rand(3)
    assert torch.equal(output, rest.forward(first.forward(x, (7, 1, 0)), (7, 1, 0)))
    assert not torch.equal(output, whole.forward(x, (8, 1, 0)))
    assert not torch.equal(output, whole.forward(x, (7, 1, 1)))
    torch.set_rng_state(state)
    whole.forward(x, (0, 0, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_only_layers_that_may_use_random_numbers_are_seeded() -> None:
    class Own(nn.Module):
        pass

    class Deterministic(nn.Module):
        uses_rng = False

    layers = {
        "known": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2)),
        "nested": nn.Sequential(nn.Sequential(nn.Dropout())),
        "own": Own(),
        "deterministic": Deterministic(),
    }
    assert Block(0, layers, None, sgd).rng_layers == {"nested", "own"}


def test_an_optimizer_state_is_restored_bit_for_bit(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    objective, spec = Backprop(), block_spec(0, 1, 3)
    adam = OptimizerSettings("adam", {"lr": 0.1})

    def trained(updates: int, start: Block | None = None) -> Block:
        with seeded("w"):
            block = Block(0, {"l": nn.Linear(4, 3).to(D)}, None, adam)
        if start is not None:
            for name, tensor in block.tensors().items():
                tensor.copy_(start.tensors()[name])
            block.load_optimizer_state(
                {name: tensor.clone() for name, tensor in start.optimizer_state().items()}
            )
        for _ in range(updates):
            backward(objective, spec, block, forward(block, x, y))
            block.update()
        return block

    straight, resumed = trained(5), trained(3, trained(2))
    resumed_tensors = {**resumed.tensors(), **resumed.optimizer_state()}
    for name, tensor in {**straight.tensors(), **straight.optimizer_state()}.items():
        assert torch.equal(tensor, resumed_tensors[name]), name


def test_swapped_tensors_are_put_back() -> None:
    block = Block(0, {"l": nn.BatchNorm1d(2)}, None, sgd)
    replacements = {name: torch.full_like(tensor, 7) for name, tensor in block.tensors().items()}
    before = {name: tensor.clone() for name, tensor in block.tensors().items()}

    with contextlib.suppress(RuntimeError), block.swap_tensors(replacements):
        assert all((tensor == 7).all() for tensor in block.tensors().values())
        raise RuntimeError
    assert all(torch.equal(block.tensors()[name], tensor) for name, tensor in before.items())
