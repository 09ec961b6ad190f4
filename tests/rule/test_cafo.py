"""The objective `cafo`: heads in closed form, sparsemax, and what stays random."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.build import build_rank
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError
from dtrain.models.image_layers import PooledLinear
from dtrain.models.mlp import Dense
from dtrain.objectives.block_spec import BlockSpec, DownstreamLayer
from dtrain.objectives.cafo import Cafo, sparsemax, sparsemax_loss
from dtrain.objectives.common.least_squares import Readout, solve_least_squares
from dtrain.planning.plan import make_plan
from dtrain.rng import seeded
from tests import tiny

D = torch.float64
ONES = torch.ones(40, 1, dtype=D)


def step(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)


def sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.T @ x, x.T @ one_hot(y, 3).to(D)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    with seeded("cafo"):
        return torch.randn(40, 6, dtype=D), torch.randint(0, 3, (40,))


# Least squares


def test_what_is_left_over_is_orthogonal_to_the_features(data: tuple[Tensor, Tensor]) -> None:
    """The normal equations X^T (X W - Y) = 0, to rounding."""
    x, y = data
    left = x @ solve_least_squares(*sums(x, y)) - one_hot(y, 3)
    assert (x.T @ left).norm() < 5e-15 * x.norm() * left.norm()


def test_features_that_depend_on_each_other_get_the_shortest_weights(
    data: tuple[Tensor, Tensor],
) -> None:
    """Where a matrix has no inverse: W = X^+ Y."""
    x, y = data
    x = torch.cat([x, x[:, :2] - 3 * x[:, 2:4]], 1)
    wanted = torch.linalg.pinv(x) @ one_hot(y, 3).to(D)
    torch.testing.assert_close(solve_least_squares(*sums(x, y)), wanted, rtol=0, atol=1e-12)


def test_idle_features_get_no_weight_and_cost_no_eigenvalues(
    data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = data
    wide = torch.zeros(40, 8, dtype=D)
    wide[:, [0, 2, 3, 4, 6, 7]] = x
    wanted = torch.linalg.pinv(wide) @ one_hot(y, 3).to(D)
    monkeypatch.delattr(torch.linalg, "pinv")
    found = solve_least_squares(*sums(wide, y))
    assert not found[[1, 5]].any()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_head_is_solved_from_all_samples_with_a_bias(
    parts: int, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    objective, where = Cafo(), BlockSpec(0, 2, (6,), (6,), D, 3, train_samples=40)
    block = made(objective, where, {"one": nn.Identity()})
    for rows, labels in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        objective.backward_pairs(where, block, MicroBatch(rows, rows, labels))
    objective.solve(where, block)
    weight, bias = block.parameters.values()
    wanted = torch.linalg.lstsq(torch.cat([x, ONES], 1), one_hot(y, 3).to(D)).solution
    torch.testing.assert_close(weight.T, wanted[:-1], rtol=0, atol=1e-13)
    torch.testing.assert_close(bias, wanted[-1], rtol=0, atol=1e-13)
    assert block.optimizer is None


def test_sums_are_in_float64_whatever_the_weights_are() -> None:
    head = Readout(nn.Flatten(), 5, 3, closed_form=True).to(torch.float32)
    assert {name: each.dtype for name, each in head.named_buffers()} == {"gram": D, "cross": D}
    assert head(torch.randn(2, 5), torch.tensor([0, 1])).dtype == torch.float32
    assert head.sample_count == 2
    head.eval()
    head(torch.randn(2, 5))
    assert head.sample_count == 2  # to predict is not to learn


# The model's own head


def pooling() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


HEADS: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "linear": (partial(nn.Linear, 6, 3), (6,), lambda x: x),
    "no bias": (partial(nn.Linear, 6, 3, bias=False), (6,), lambda x: x),
    "dense": (partial(Dense, 24, 3), (6, 2, 2), lambda x: x.flatten(1)),
    "pooled": (partial(PooledLinear, 6, 3), (6, 4, 4), lambda x: x.mean((2, 3))),
    "sequential": (
        lambda: nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(24, 3)),
        (6, 2, 2),
        lambda x: x.flatten(1).tanh(),
    ),
}


def made(objective: Cafo, where: BlockSpec, layers: dict[str, nn.Module]) -> Block:
    """Return a block as a run puts it together."""
    helper = objective.build_head(where)
    for each in objective.frozen_modules(where, layers):
        each.requires_grad_(False)
    block = Block(where.index, layers, None if helper is None else helper.to(D), step)
    block.register_taps(objective.taps(block))
    return block


def topped(head: Any, entering: tuple[int, ...], block: int = 1, samples: int = 40) -> BlockSpec:
    top = DownstreamLayer("head", (3,), 0, head)
    return BlockSpec(block, block + 1, entering, (3,), D, 3, train_samples=samples, last_layer=top)


@pytest.mark.parametrize("kind", HEADS)
def test_the_models_own_head_is_solved_in_place(kind: str, data: tuple[Tensor, Tensor]) -> None:
    """From what enters its linear map, whatever the layer does to it first; its bias, too."""
    head, shape, seen = HEADS[kind]
    with seeded("head"):
        layer, x = head().to(D), torch.randn(40, *shape, dtype=D)
    objective, where, y = Cafo(), topped(head, shape), data[1]
    block = made(objective, where, {"body": nn.Identity(), "head": layer})
    own = dict(layer.named_parameters())
    first = [block.run_forward(MicroBatch(x=part, targets=y[i : i + 20])) for i, part in parts(x)]
    for live in first:  # all forwards before any learning: taps are those of the micro-batch
        block.backward(objective.backward_pairs(where, block, live))
    objective.solve(where, block)
    features = seen(x) if "no bias" in kind else torch.cat([seen(x), ONES], 1)
    wanted = torch.linalg.lstsq(features, one_hot(y, 3).to(D)).solution
    torch.testing.assert_close(layer(x), features @ wanted, rtol=0, atol=1e-12)
    assert all(each is own[name] for name, each in layer.named_parameters())
    assert all(each.grad is None for each in layer.parameters())


def parts(x: Tensor) -> list[tuple[int, Tensor]]:
    return [(0, x[:20]), (20, x[20:])]


def test_heads_that_cannot_be_solved_are_refused_by_name() -> None:
    conv = partial(nn.Sequential, nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ending = r"layer 'head' has none: end the model with torch\.nn\.Linear"
    with pytest.raises(DtrainError, match=ending):
        Cafo().build_head(topped(conv, (4, 2, 2)))
    with pytest.raises(DtrainError, match=r"layer 'head' ends in 5 numbers.* head = \"ce\""):
        Cafo().build_head(topped(partial(nn.Linear, 4, 5), (4,)))
    assert Cafo("ce").build_head(topped(conv, (4, 2, 2))) is None


def test_a_run_refuses_such_a_head_before_it_starts() -> None:
    with pytest.raises(DtrainError, match="layer '3' has none"):
        make_plan(
            tiny.run(objective__name="cafo", model={"name": "tests.rule.test_cafo:softened"}), 1
        )


def softened() -> nn.Sequential:
    """Return a net whose last layer is not linear."""
    return nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.Linear(8, 3), nn.LogSoftmax(1))


# Heads that learn


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    z = 2 * torch.randn(50, 7, dtype=D)
    p = sparsemax(z)
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=D), rtol=1e-14, atol=0)
    assert p.min() == 0
    # Optimality: p - z + tau = 0 where p > 0, and >= 0 elsewhere.
    tau = ((z * (p > 0)).sum(1) - 1) / (p > 0).sum(1)
    gap = p - z + tau[:, None]
    assert gap[p > 0].abs().max() < 1e-14
    assert gap.min() > -1e-14
    torch.testing.assert_close(sparsemax(z + 5), p, rtol=0, atol=1e-14)


def test_the_loss_of_sparsemax_is_its_definition() -> None:
    """L = -z_y + 1/2 sum over the support of (z^2 - tau^2) + 1/2, its gradient p - onehot."""
    z, y = (2 * torch.randn(50, 7, dtype=D)).requires_grad_(), torch.randint(0, 7, (50,))
    loss = sparsemax_loss(z, y)
    p, held = sparsemax(z.detach()), z.detach()
    inside = p > 0
    tau = ((held * inside).sum(1, keepdim=True) - 1) / inside.sum(1, keepdim=True)
    each = ((held**2 - tau**2) * inside).sum(1) / 2 + 0.5 - held[torch.arange(50), y]
    torch.testing.assert_close(loss.detach(), each.mean(), rtol=1e-14, atol=0)
    assert each.min() > -1e-14
    loss.backward()
    torch.testing.assert_close(z.grad, (p - one_hot(y, 7)) / 50, rtol=0, atol=1e-16)
    assert gradcheck(lambda scores: sparsemax_loss(scores, y), z)


def test_sparsemax_of_a_clear_winner_costs_nothing() -> None:
    z = torch.tensor([[3.0, 1.5, -1.0]], dtype=D, requires_grad=True)
    loss = sparsemax_loss(z, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("head", ["ce", "sparsemax"])
def test_of_random_blocks_heads_alone_learn(head: Any, data: tuple[Tensor, Tensor]) -> None:
    """Weight decay reaches nothing else, either."""
    x, y = data
    objective, loss = Cafo(head), {"ce": cross_entropy, "sparsemax": sparsemax_loss}[head]
    body, own = nn.Linear(6, 5).to(D), nn.Linear(5, 3).to(D)
    inner, where = made(objective, inside(5), {"one": body}), topped(None, (5,))
    last = made(objective, where, {"two": nn.Linear(5, 5).to(D), "head": own})
    assert [*inner.parameters][2:] == ["heads.0.linear.weight", "heads.0.linear.bias"]
    assert [id(each) for each in inner.trainable_parameters] == [
        id(inner.parameters[n]) for n in HEAD
    ]
    assert [id(each) for each in last.trainable_parameters] == [id(own.weight), id(own.bias)]
    live = inner.run_forward(MicroBatch(x=x, targets=y))
    inner.backward(objective.backward_pairs(inside(5), inner, live))
    weight, bias = (inner.parameters[n] for n in HEAD)
    h = body(x).detach()
    wanted = torch.autograd.grad(loss(h @ weight.T + bias, y), [weight, bias])
    torch.testing.assert_close([weight.grad, bias.grad], list(wanted))
    after = last.run_forward(MicroBatch(x=h, targets=y))
    last.backward(objective.backward_pairs(where, last, after))
    assert own.weight.grad is not None
    assert all(each.grad is None for each in last.layers["two"].parameters())


HEAD = ["heads.0.linear.weight", "heads.0.linear.bias"]


def inside(width: int) -> BlockSpec:
    return BlockSpec(0, 2, (6,), (width,), D, 3, train_samples=40)


@pytest.mark.parametrize("head", ["least-squares", "ce", "sparsemax"])
def test_trained_blocks_learn_from_their_own_head(head: Any, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    objective, body = Cafo(head, "trained"), nn.Linear(6, 5).to(D)
    block = made(objective, inside(5), {"one": body})
    live = block.run_forward(MicroBatch(x=x, targets=y))
    block.backward(objective.backward_pairs(inside(5), block, live))
    weight, bias = (block.parameters[n].detach() for n in HEAD)
    scores = body(x) @ weight.T + bias
    loss = {
        "least-squares": lambda: (scores - one_hot(y, 3)).square().mean(),
        "ce": lambda: cross_entropy(scores, y),
        "sparsemax": lambda: sparsemax_loss(scores, y),
    }[head]()
    [wanted] = torch.autograd.grad(loss, [body.weight])
    torch.testing.assert_close(body.weight.grad, wanted, rtol=1e-12, atol=1e-15)
    assert (block.parameters[HEAD[0]].grad is None) == (head == "least-squares")


def test_trained_with_cross_entropy_one_block_is_ordinary_backprop(
    data: tuple[Tensor, Tensor],
) -> None:
    x, y = data
    objective, where = Cafo("ce", "trained"), topped(None, (6,), 0)
    block = made(objective, where, {"head": nn.Linear(6, 3).to(D)})
    block.backward(
        objective.backward_pairs(where, block, block.run_forward(MicroBatch(x=x, targets=y)))
    )
    wanted = torch.autograd.grad(
        cross_entropy(block.layers["head"](x), y), block.trainable_parameters
    )
    assert all(torch.equal(w, g) for w, g in zip(wanted, block.gradients(), strict=True))


# Epochs


@pytest.mark.parametrize(("blocks", "left"), [("random", 80), ("trained", 0)])
def test_sums_of_blocks_that_move_start_anew_with_an_epoch(
    blocks: Any, left: int, data: tuple[Tensor, Tensor]
) -> None:
    """In its middle they go on, so that a segment within an epoch is solved from all so far."""
    x, y = data
    objective, where = Cafo(blocks=blocks), inside(6)
    block = made(objective, where, {"one": nn.Identity()})
    assert isinstance(block.head, Readout)
    for _ in range(2):
        for i, part in parts(x):
            objective.backward_pairs(where, block, MicroBatch(part, part, y[i : i + 20]))
            seen = block.head.sample_count
            objective.solve(where, block)
            assert block.head.sample_count in (seen, 0)
        torch.testing.assert_close(
            block.head.linear.weight if block.head.linear else None,
            torch.linalg.lstsq(torch.cat([x, ONES], 1), one_hot(y, 3).to(D)).solution[:-1].T,
            rtol=0,
            atol=1e-13,
        )
    assert block.head.sample_count == left


# Prediction, warnings


def test_the_vote_is_a_sum_of_probabilities() -> None:
    z, where = torch.randn(5, 3, dtype=D), inside(4)
    for head in ("least-squares", "ce"):
        assert torch.equal(Cafo(head).vote(where, z), z.softmax(1))
    assert torch.equal(Cafo("sparsemax").vote(where, z), sparsemax(z))
    assert Cafo().predicts_by_vote


def test_large_sums_are_told_of() -> None:
    tasks = [
        BlockSpec(0, 2, (6,), (8192,), D, 3, train_samples=50000),
        topped(partial(nn.Linear, 6, 3), (6,)),
    ]
    [wide] = Cafo().warnings(tasks, 32)
    assert "0.5 GB in block 0" in wide
    tasks[0] = BlockSpec(0, 2, (6,), (48, 12, 12), D, 3, train_samples=1000)
    [short] = Cafo().warnings(tasks, 32)
    assert "1000 samples do not determine as many weights per class (1728 in block 0)" in short
    assert Cafo("ce").warnings(tasks, 32) == []


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_networks_for_images_are_put_together(model: str, tmp_path: Path) -> None:
    """Heads on at most so many numbers; the model's own head behind its pooling."""
    net = {"cnn": {"widths": [[4], [8]]}, "resnet": {"depth": 8, "width": 4}}[model]
    run = tiny.run(
        data={"name": "tests.pictures:samples"},
        model={"name": model, **net},
        objective={"name": "cafo", "features": 40},
    )
    job = build_rank(make_plan(run, 1), Comm(SingleBackend()))
    widths = [each.head.gram.shape[0] - 1 for each in job.engine.blocks.values() if each.head]
    assert all(width <= 40 for width in widths)
    assert widths[-1] == {"cnn": 8, "resnet": 16}[model]
