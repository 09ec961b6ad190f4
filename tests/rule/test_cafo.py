"""The objective `cafo`: heads in closed form, sparsemax, and blocks that stay random."""

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
from dtrain.errors import ConfigError
from dtrain.models.image_layers import PooledLinear
from dtrain.models.mlp import Dense
from dtrain.objectives.block_spec import BlockSpec, DownstreamLayer
from dtrain.objectives.cafo import Cafo, sparsemax, sparsemax_loss
from dtrain.objectives.common.least_squares import Readout, solve_least_squares
from dtrain.planning.plan import make_plan
from dtrain.rng import seeded
from tests import tiny
from tests.refusals import refuses
from tests.rule.warning_numbers import numbers_in

D = torch.float64
ONES = torch.ones(40, 1, dtype=D)


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)


def sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.T @ x, x.T @ one_hot(y, 3).to(D)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    with seeded("cafo"):
        return torch.randn(40, 6, dtype=D), torch.randint(0, 3, (40,))


# Least squares


def test_the_residual_is_orthogonal_to_the_features(data: tuple[Tensor, Tensor]) -> None:
    """The normal equations X^T (X W - Y) = 0, to rounding."""
    x, y = data
    residual = x @ solve_least_squares(*sums(x, y)) - one_hot(y, 3)
    assert (x.T @ residual).norm() < 5e-15 * x.norm() * residual.norm()


def test_dependent_features_get_the_weights_of_least_norm(
    data: tuple[Tensor, Tensor],
) -> None:
    """If the matrix has no inverse: W = X^+ Y."""
    x, y = data
    x = torch.cat([x, x[:, :2] - 3 * x[:, 2:4]], 1)
    expected = torch.linalg.pinv(x) @ one_hot(y, 3).to(D)
    torch.testing.assert_close(solve_least_squares(*sums(x, y)), expected, rtol=0, atol=1e-12)


def test_features_that_are_always_zero_get_no_weight_and_need_no_eigenvalues(
    data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = data
    padded = torch.zeros(40, 8, dtype=D)
    padded[:, [0, 2, 3, 4, 6, 7]] = x
    expected = torch.linalg.pinv(padded) @ one_hot(y, 3).to(D)
    monkeypatch.delattr(torch.linalg, "pinv")
    weights = solve_least_squares(*sums(padded, y))
    assert not weights[[1, 5]].any()
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("count", [1, 3])
def test_a_head_is_solved_from_all_samples_with_a_bias(
    count: int, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    objective, spec = Cafo(), BlockSpec(0, 2, (6,), (6,), D, 3, train_samples=40)
    block = make_block(objective, spec, {"one": nn.Identity()})
    for rows, labels in zip(x.tensor_split(count), y.tensor_split(count), strict=True):
        objective.backward_pairs(spec, block, MicroBatch(rows, rows, labels))
    objective.solve(spec, block)
    weight, bias = block.parameters.values()
    expected = torch.linalg.lstsq(torch.cat([x, ONES], 1), one_hot(y, 3).to(D)).solution
    torch.testing.assert_close(weight.T, expected[:-1], rtol=0, atol=1e-13)
    torch.testing.assert_close(bias, expected[-1], rtol=0, atol=1e-13)
    assert block.optimizer is None


def test_sums_are_in_float64_whatever_the_weights_are() -> None:
    head = Readout(nn.Flatten(), 5, 3, closed_form=True).to(torch.float32)
    assert {name: buffer.dtype for name, buffer in head.named_buffers()} == {"gram": D, "cross": D}
    assert head(torch.randn(2, 5), torch.tensor([0, 1])).dtype == torch.float32
    assert head.sample_count == 2
    head.eval()
    head(torch.randn(2, 5))
    assert head.sample_count == 2  # prediction adds nothing


# The model's own head


def pooling_stem() -> nn.Module:
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


def make_block(objective: Cafo, spec: BlockSpec, layers: dict[str, nn.Module]) -> Block:
    """Return a block as a run assembles it."""
    head = objective.make_head(spec)
    for module in objective.frozen_modules(spec, layers):
        module.requires_grad_(False)
    block = Block(spec.index, layers, head and head.to(D), sgd)
    block.register_taps(objective.taps(block))
    return block


def last_spec(head: Any, input_shape: tuple[int, ...], block: int = 1) -> BlockSpec:
    """Return the spec of the last block, whose last layer `head` makes."""
    layer = DownstreamLayer("head", (3,), 0, head)
    return BlockSpec(block, block + 1, input_shape, (3,), D, 3, train_samples=40, last_layer=layer)


@pytest.mark.parametrize("kind", HEADS)
def test_the_models_own_head_is_solved_in_place(kind: str, data: tuple[Tensor, Tensor]) -> None:
    """From the input of its linear map, whatever the layer does before; its bias, too."""
    head, shape, features_of = HEADS[kind]
    with seeded("head"):
        layer, x = head().to(D), torch.randn(40, *shape, dtype=D)
    objective, spec, y = Cafo(), last_spec(head, shape), data[1]
    block = make_block(objective, spec, {"body": nn.Identity(), "head": layer})
    parameters = dict(layer.named_parameters())
    micro_batches = [
        block.run_forward(MicroBatch(x=part, targets=y[i : i + 20])) for i, part in halves(x)
    ]
    # All forwards come before any backward: taps belong to the micro-batch.
    for micro_batch in micro_batches:
        block.backward(objective.backward_pairs(spec, block, micro_batch))
    objective.solve(spec, block)
    features = features_of(x)
    features = features if "no bias" in kind else torch.cat([features, ONES], 1)
    expected = torch.linalg.lstsq(features, one_hot(y, 3).to(D)).solution
    torch.testing.assert_close(layer(x), features @ expected, rtol=0, atol=1e-12)
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    assert all(p.grad is None for p in layer.parameters())


def halves(x: Tensor) -> list[tuple[int, Tensor]]:
    return [(0, x[:20]), (20, x[20:])]


def test_heads_that_cannot_be_solved_are_refused() -> None:
    conv = partial(nn.Sequential, nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with refuses(ConfigError, "objective.head-not-linear"):
        Cafo().build_head(last_spec(conv, (4, 2, 2)))
    with refuses(ConfigError, "objective.head-not-linear"):
        Cafo().build_head(last_spec(partial(nn.Linear, 4, 5), (4,)))
    assert Cafo("ce").make_head(last_spec(conv, (4, 2, 2))) is None


def test_a_run_refuses_such_a_head_before_it_starts() -> None:
    with refuses(ConfigError, "objective.head-not-linear"):
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
    p, scores = sparsemax(z.detach()), z.detach()
    support = p > 0
    tau = ((scores * support).sum(1, keepdim=True) - 1) / support.sum(1, keepdim=True)
    losses = ((scores**2 - tau**2) * support).sum(1) / 2 + 0.5 - scores[torch.arange(50), y]
    torch.testing.assert_close(loss.detach(), losses.mean(), rtol=1e-14, atol=0)
    assert losses.min() > -1e-14
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
def test_in_random_blocks_only_heads_learn(head: Any, data: tuple[Tensor, Tensor]) -> None:
    """Weight decay applies to nothing else, either."""
    x, y = data
    objective, loss = Cafo(head), {"ce": cross_entropy, "sparsemax": sparsemax_loss}[head]
    body, model_head = nn.Linear(6, 5).to(D), nn.Linear(5, 3).to(D)
    earlier, spec = make_block(objective, earlier_spec(5), {"one": body}), last_spec(None, (5,))
    last = make_block(objective, spec, {"two": nn.Linear(5, 5).to(D), "head": model_head})
    assert [*earlier.parameters][2:] == ["heads.0.linear.weight", "heads.0.linear.bias"]
    head_parameters = [earlier.parameters[n] for n in HEAD]
    assert list(map(id, earlier.trainable_parameters)) == list(map(id, head_parameters))
    assert list(map(id, last.trainable_parameters)) == list(map(id, model_head.parameters()))
    micro_batch = earlier.run_forward(MicroBatch(x=x, targets=y))
    earlier.backward(objective.backward_pairs(earlier_spec(5), earlier, micro_batch))
    weight, bias = head_parameters
    h = body(x).detach()
    expected = torch.autograd.grad(loss(h @ weight.T + bias, y), [weight, bias])
    torch.testing.assert_close([weight.grad, bias.grad], list(expected))
    micro_batch = last.run_forward(MicroBatch(x=h, targets=y))
    last.backward(objective.backward_pairs(spec, last, micro_batch))
    assert model_head.weight.grad is not None
    assert all(p.grad is None for p in last.layers["two"].parameters())


HEAD = ["heads.0.linear.weight", "heads.0.linear.bias"]


def earlier_spec(width: int) -> BlockSpec:
    return BlockSpec(0, 2, (6,), (width,), D, 3, train_samples=40)


@pytest.mark.parametrize("head", ["least-squares", "ce", "sparsemax"])
def test_trained_blocks_learn_from_their_own_head(head: Any, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    objective, body = Cafo(head, "trained"), nn.Linear(6, 5).to(D)
    block = make_block(objective, earlier_spec(5), {"one": body})
    micro_batch = block.run_forward(MicroBatch(x=x, targets=y))
    block.backward(objective.backward_pairs(earlier_spec(5), block, micro_batch))
    weight, bias = (block.parameters[n].detach() for n in HEAD)
    scores = body(x) @ weight.T + bias
    loss = {
        "least-squares": lambda: (scores - one_hot(y, 3)).square().mean(),
        "ce": lambda: cross_entropy(scores, y),
        "sparsemax": lambda: sparsemax_loss(scores, y),
    }[head]()
    [expected] = torch.autograd.grad(loss, [body.weight])
    torch.testing.assert_close(body.weight.grad, expected, rtol=1e-12, atol=1e-15)
    assert (block.parameters[HEAD[0]].grad is None) == (head == "least-squares")


def test_trained_with_cross_entropy_one_block_is_ordinary_backprop(
    data: tuple[Tensor, Tensor],
) -> None:
    x, y = data
    objective, spec = Cafo("ce", "trained"), last_spec(None, (6,), 0)
    block = make_block(objective, spec, {"head": nn.Linear(6, 3).to(D)})
    micro_batch = block.run_forward(MicroBatch(x=x, targets=y))
    block.backward(objective.backward_pairs(spec, block, micro_batch))
    expected = torch.autograd.grad(
        cross_entropy(block.layers["head"](x), y), block.trainable_parameters
    )
    assert all(map(torch.equal, block.gradients(), expected))


# Epochs


@pytest.mark.parametrize(("blocks", "samples_left"), [("random", 80), ("trained", 0)])
def test_sums_of_trained_blocks_start_anew_with_an_epoch(
    blocks: Any, samples_left: int, data: tuple[Tensor, Tensor]
) -> None:
    """Within it they grow, so a segment within an epoch is solved from all samples so far."""
    x, y = data
    objective, spec = Cafo(blocks=blocks), earlier_spec(6)
    block = make_block(objective, spec, {"one": nn.Identity()})
    assert isinstance(block.head, Readout)
    for _ in range(2):
        for i, part in halves(x):
            objective.backward_pairs(spec, block, MicroBatch(part, part, y[i : i + 20]))
            count = block.head.sample_count
            objective.solve(spec, block)
            assert block.head.sample_count in (count, 0)
        torch.testing.assert_close(
            block.head.linear.weight if block.head.linear else None,
            torch.linalg.lstsq(torch.cat([x, ONES], 1), one_hot(y, 3).to(D)).solution[:-1].T,
            rtol=0,
            atol=1e-13,
        )
    assert block.head.sample_count == samples_left


# Prediction, warnings


def test_the_vote_is_a_sum_of_probabilities() -> None:
    z, spec = torch.randn(5, 3, dtype=D), earlier_spec(4)
    for head in ("least-squares", "ce"):
        assert torch.equal(Cafo(head).vote(spec, z), z.softmax(1))
    assert torch.equal(Cafo("sparsemax").vote(spec, z), sparsemax(z))
    assert Cafo().predicts_by_vote


def test_large_sums_are_warned_of() -> None:
    specs = [
        BlockSpec(0, 2, (6,), (8192,), D, 3, train_samples=50000),
        last_spec(partial(nn.Linear, 6, 3), (6,)),
    ]
    [warning] = Cafo().warnings(specs, 32)
    assert numbers_in(warning) >= {"0.5", "0"}
    specs[0] = BlockSpec(0, 2, (6,), (48, 12, 12), D, 3, train_samples=1000)
    [warning] = Cafo().warnings(specs, 32)
    assert numbers_in(warning) >= {"1000", "1728", "0"}
    assert Cafo("ce").warnings(specs, 32) == []


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_image_models_are_assembled(model: str, tmp_path: Path) -> None:
    """Heads on at most so many numbers; the model's own head behind its pooling."""
    net = {"cnn": {"widths": [[4], [8]]}, "resnet": {"depth": 8, "width": 4}}[model]
    run = tiny.run(
        data={"name": "tests.pictures:samples"},
        model={"name": model, **net},
        objective={"name": "cafo", "features": 40},
    )
    job = build_rank(make_plan(run, 1), Comm(SingleBackend()))
    widths = [block.head.gram.shape[0] - 1 for block in job.engine.blocks.values() if block.head]
    assert all(width <= 40 for width in widths)
    assert widths[-1] == {"cnn": 8, "resnet": 16}[model]
