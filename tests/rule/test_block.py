"""Laws of one block and of objectives, against autograd in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.block import optimizer as optimizers
from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import DtrainError
from dtrain.objectives.backprop import Backprop
from dtrain.objectives.base import GRADIENT, Objective, forward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.mono_forward import MonoForward
from dtrain.rng import seeded

D = torch.float64
sgd = partial(optimizers.make_optimizer, "sgd", {"lr": 0.1})


def task(block: int, blocks: int, outputs: int) -> BlockSpec:
    return BlockSpec(block, blocks, (4,), (outputs,), D, 3)


def block(objective: Objective, where: BlockSpec, *layers: nn.Module) -> Block:
    helper = objective.make_head(where)
    named = {f"l{where.index}{i}": layer.to(D) for i, layer in enumerate(layers)}
    return Block(where.index, named, None if helper is None else helper.to(D), sgd)


def live(of: Block, x: Tensor, y: Tensor, share: float = 1.0) -> MicroBatch:
    x = x.detach().requires_grad_()
    return MicroBatch(x, of.forward(x, (0, 0, 0)), y, share)


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
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(D)
    with seeded("net"):
        own = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    objective, where = kind(), task(0, 1, 3)
    alone = block(objective, where, *own)
    step = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        step.zero_grad()
        cross_entropy(net(x), y).backward()
        step.step()
        alone.backward(objective.backward_pairs(where, alone, live(alone, x, y)))
        alone.update()
    for theirs, ours in zip(net.parameters(), alone.parameters.values(), strict=True):
        assert torch.equal(theirs, ours)


def test_the_gradients_of_mono_forward_are_the_closed_form(batch: tuple[Tensor, Tensor]) -> None:
    """With delta = (softmax(G) - Y) / B: dM = delta^T a, dW = ((delta M) * phi'(z))^T h."""
    x, y = batch
    objective, where = MonoForward(), task(0, 2, 5)
    inner = block(objective, where, nn.Linear(4, 5), nn.Tanh())
    inner.backward(objective.backward_pairs(where, inner, live(inner, x, y)))
    weight, bias, head = (t.detach() for t in inner.parameters.values())
    a = torch.tanh(x @ weight.T + bias)
    delta = ((a @ head.T).softmax(1) - torch.eye(3, dtype=D)[y]) / len(x)
    told = (delta @ head) * (1 - a**2)
    dw, db, dm = inner.gradients()
    assert list(inner.parameters) == ["l00.weight", "l00.bias", "heads.0.1.weight"]
    torch.testing.assert_close(dm, delta.T @ a, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(dw, told.T @ x, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(db, told.sum(0), rtol=1e-13, atol=1e-15)


def test_blocks_of_backprop_have_the_gradients_of_the_whole_net(
    batch: tuple[Tensor, Tensor],
) -> None:
    x, y = batch
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)]
    net = nn.Sequential(*layers).to(D)
    cross_entropy(net(x), y).backward()
    wanted = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    objective = Backprop()
    tasks = [task(0, 3, 5), task(1, 3, 4), task(2, 3, 3)]
    parts = [layers[:2], layers[2:4], layers[4:]]
    blocks = [block(objective, t, *part) for t, part in zip(tasks, parts, strict=True)]
    lives: list[MicroBatch] = []
    for each in blocks:
        lives.append(live(each, lives[-1].y if lives else x, y))
    told: Tensor | None = None
    for where, each, at in reversed(list(zip(tasks, blocks, lives, strict=True))):
        at.received = {} if told is None else {GRADIENT: told}
        each.backward(objective.backward_pairs(where, each, at))
        told = at.x.grad
    found = [gradient for each in blocks for gradient in each.gradients()]
    for theirs, ours in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", [Backprop, MonoForward])
def test_a_signal_is_scaled_once_where_it_is_born(
    kind: Callable[[], Objective], batch: tuple[Tensor, Tensor]
) -> None:
    """Law 3: unequal micro-batches add up to the gradient of the mean over all samples."""
    x, y = batch
    objective, where = kind(), task(1, 2, 3)
    one = block(objective, where, nn.Linear(4, 3))
    one.backward(objective.backward_pairs(where, one, live(one, x, y)))
    wanted = [gradient.clone() for gradient in one.gradients()]
    one.update()
    many = block(objective, where, *one.layers.values())
    with torch.no_grad():
        for parameter, gradient in zip(many.parameters.values(), wanted, strict=True):
            parameter += 0.1 * gradient
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        at = live(many, x[part], y[part], len(x[part]) / len(x))
        many.backward(objective.backward_pairs(where, many, at))
    for theirs, ours in zip(wanted, many.gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_no_loss_reaches_into_another_block(batch: tuple[Tensor, Tensor]) -> None:
    """Law 7: what a local objective pulls in block 1 leaves block 0 without a gradient."""
    x, y = batch
    objective, first, second = MonoForward(), task(0, 2, 5), task(1, 2, 3)
    lower = block(objective, first, nn.Linear(4, 5))
    upper = block(objective, second, nn.Linear(5, 3))
    passed = objective.make_message(forward_routes(2)[0], lower, live(lower, x, y))
    assert not passed.requires_grad
    upper.backward(
        objective.backward_pairs(second, upper, MicroBatch(passed, upper.forward(passed, ()), y))
    )
    assert all(p.grad is None for p in lower.parameters.values())
    assert all(p.grad is not None for p in upper.parameters.values())


def test_draws_follow_the_layer_and_the_clock_not_the_cut() -> None:
    layers = {"a": nn.Dropout(0.5), "b": nn.Linear(6, 6).to(D), "c": nn.Dropout(0.5)}
    x = torch.ones(4, 6, dtype=D)
    whole = Block(0, layers, None, sgd, seed=5)
    first = Block(0, {"a": layers["a"]}, None, sgd, seed=5)
    rest = Block(1, {name: layers[name] for name in "bc"}, None, sgd, seed=5)
    before = torch.get_rng_state()
    one = whole.forward(x, (7, 1, 0))
    torch.rand(3)
    two = rest.forward(first.forward(x, (7, 1, 0)), (7, 1, 0))
    assert torch.equal(one, two)
    assert not torch.equal(one, whole.forward(x, (8, 1, 0)))
    assert not torch.equal(one, whole.forward(x, (7, 1, 1)))
    torch.set_rng_state(before)
    whole.forward(x, (0, 0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_only_layers_that_may_draw_pay_for_it() -> None:
    class Own(nn.Module):
        pass

    layers = {
        "calm": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2)),
        "nested": nn.Sequential(nn.Sequential(nn.Dropout())),
        "own": Own(),
    }
    assert Block(0, layers, None, sgd).rng_layers == {"nested", "own"}


def test_an_optimizer_remembers_bit_for_bit(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    objective, where = Backprop(), task(0, 1, 3)

    def trained(updates: range, start: Block | None = None) -> Block:
        with seeded("w"):
            new = Block(
                0,
                {"l": nn.Linear(4, 3).to(D)},
                None,
                partial(optimizers.make_optimizer, "adam", {"lr": 0.1}),
            )
        if start is not None:
            for name, tensor in new.tensors().items():
                tensor.copy_(start.tensors()[name])
            new.load_optimizer_state(
                {name: tensor.clone() for name, tensor in start.optimizer_state().items()}
            )
        for _ in updates:
            new.backward(objective.backward_pairs(where, new, live(new, x, y)))
            new.update()
        return new

    straight, resumed = trained(range(5)), trained(range(3), trained(range(2)))
    for name, tensor in {**straight.tensors(), **straight.optimizer_state()}.items():
        assert torch.equal(tensor, {**resumed.tensors(), **resumed.optimizer_state()}[name]), name


def test_a_view_is_shown_and_put_back() -> None:
    shown = Block(0, {"l": nn.BatchNorm1d(2)}, None, sgd)
    view = {name: torch.full_like(tensor, 7) for name, tensor in shown.tensors().items()}
    before = {name: tensor.clone() for name, tensor in shown.tensors().items()}

    with contextlib.suppress(RuntimeError), shown.swap_tensors(view):
        assert all((tensor == 7).all() for tensor in shown.tensors().values())
        raise RuntimeError
    assert all(torch.equal(shown.tensors()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", sorted(optimizers.optimizer_classes()))
def test_every_optimizer_of_torch_steps(name: str) -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = optimizers.make_optimizer(name, {}, [parameter])
    parameter.square().sum().backward()
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("adm", {}, ["'adm'", "did you mean 'adam'"]),
        ("adam", {"momentum": 0.9}, ["'momentum'", "betas"]),
        ("sgd", {"lr": -1.0}, ["'sgd'", "-1"]),
        ("lbfgs", {}, ["'lbfgs'"]),
    ],
)
def test_wrong_optimizers_are_refused(
    name: str, fields: dict[str, float], words: list[str]
) -> None:
    with pytest.raises(DtrainError) as refusal:
        optimizers.check_optimizer(name, fields)
    assert all(word in refusal.value.message for word in words)
