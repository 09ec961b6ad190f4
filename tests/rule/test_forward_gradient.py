"""The objectives `forward-gradient` and `ulr`: their identities, in float64, against autograd."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from dtrain.block.block import Block
from dtrain.block.leaf_calls import leaf_modules
from dtrain.block.micro_batch import MicroBatch, RowRandom
from dtrain.errors import ConfigError
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.perturbed_heads import (
    SQUARE,
    VARIANCE,
    PerturbedForward,
    PerturbedHead,
)
from dtrain.objectives.forward_gradient import ForwardGradient
from dtrain.objectives.ulr import Ulr
from dtrain.rng import seeded
from dtrain.tasks.task import Task
from tests import tiny
from tests.refusals import refuses
from tests.rule.blocks_in_process import D, build_blocks, train_micro_batch


def make_net(*sizes: int) -> list[nn.Module]:
    """Return linear layers with tanh between them."""
    with seeded("net"):
        layers: list[nn.Module] = []
        for pair in pairwise(sizes):
            layers += [nn.Linear(*pair).to(D), nn.Tanh()]
    return layers


def first_block(
    objective: PerturbedHead,
    layers: list[nn.Module],
    x: Tensor,
    y: Tensor,
    task: Task | None = None,
) -> tuple[BlockSpec, Block, MicroBatch]:
    """Return the first of two blocks, and its micro-batch after the forward."""
    blocks = build_blocks(objective, [layers, [nn.Linear(layers[-2].out_features, 4).to(D)]], x, 4)
    spec, block = blocks[0]
    rows = RowRandom(0, 0, 0, len(x), 0, len(x))
    micro_batch = MicroBatch(targets=y, x=x, row_random=rows, rng_key=(0, 0, 0))
    if task is not None:
        micro_batch.task = task
    block.run_forward(micro_batch, needs_graph=False)
    return spec, block, micro_batch


def sample_gradients(block: Block, micro_batch: MicroBatch) -> Tensor:
    """Return the gradients (rows, n) of each sample's loss at the outputs of its linear layers."""
    outputs, h = [], micro_batch.x
    for layer in block.layers.values():
        h = layer(h)
        if isinstance(layer, nn.Linear):
            outputs.append(h)
    assert block.head is not None
    losses = micro_batch.task.sample_losses(block.head(h), micro_batch.targets)
    return torch.cat(torch.autograd.grad(losses.sum(), outputs), 1)


def estimates(objective: PerturbedHead, spec: BlockSpec, block: Block, batch: MicroBatch) -> Tensor:
    """Return the estimates (rows, n) of each sample's own loss."""
    pairs = objective.backward_pairs(spec, block, batch)[:-1]
    return torch.cat([cotangent for _, cotangent in pairs], 1) / batch.sample_scale


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    with seeded("batch"):
        return torch.randn(6, 5, dtype=D), torch.randint(0, 4, (6,))


def test_the_sum_over_a_basis_is_the_gradient(batch: tuple[Tensor, Tensor]) -> None:
    objective = ForwardGradient()
    spec, block, micro_batch = first_block(objective, make_net(5, 7, 3), *batch)
    forward = PerturbedForward(objective, spec, block, micro_batch, leaf_modules(block.layers))
    total = torch.zeros(6, 10, dtype=D)
    for v in torch.eye(10, dtype=D):
        rows = v.expand(6, 10)
        noise = {"l00": rows[:, :7], "l02": rows[:, 7:]}
        total += objective.loss_changes(forward, noise, micro_batch)[:, None] * rows
    assert float((total - sample_gradients(block, micro_batch)).abs().max()) < 1e-15


@pytest.mark.parametrize(("distribution", "factor"), [("normal", 322.0), ("signs", 320.0)])
def test_the_second_moment_and_the_recorded_variance(distribution: str, factor: float) -> None:
    """E |g|^2 = (n + 2) |grad|^2, n = 320; of signs n |grad|^2. Equal rows have their own noise."""
    with seeded("row"):
        x = torch.randn(1, 5, dtype=D).expand(2000, 5)
    y, layers = torch.zeros(2000, dtype=torch.int64), make_net(5, 200, 120)
    square = {}
    for number in (1, 4):
        objective = ForwardGradient(distribution=distribution, perturbations=number)  # type: ignore[arg-type]
        spec, block, micro_batch = first_block(objective, layers, x, y)
        objective.backward_pairs(spec, block, micro_batch)
        exact = float(sample_gradients(block, micro_batch)[0].square().sum())
        square[number] = float(micro_batch.metrics[SQUARE]) / exact
        variance = float(micro_batch.metrics[VARIANCE]) / exact
    assert square[1] == pytest.approx(factor, rel=0.08)
    assert square[4] == pytest.approx(1 + (factor - 1) / 4, rel=0.08)
    assert variance == pytest.approx((factor - 1) / 4, rel=0.08)


def test_the_cosine_of_the_mean_of_several() -> None:
    """About sqrt(K / (K + n + 1))."""
    with seeded("row"):
        x = torch.randn(1, 5, dtype=D).expand(300, 5)
    objective = ForwardGradient(perturbations=60)
    spec, block, micro_batch = first_block(
        objective, make_net(5, 20), x, torch.zeros(300, dtype=torch.int64)
    )
    gradients = sample_gradients(block, micro_batch)
    cosine = torch.cosine_similarity(estimates(objective, spec, block, micro_batch), gradients)
    assert float(cosine.mean()) == pytest.approx(math.sqrt(60 / (60 + 20 + 1)), rel=0.02)


@pytest.mark.parametrize(
    "objective",
    [
        Ulr(noise=1.0),
        Ulr(noise=1.0, antithetic=True),
        Ulr(noise=1.0, distribution="signs"),
        ForwardGradient(),
    ],
)
def test_estimates_are_unbiased_on_a_quadratic(objective: PerturbedHead) -> None:
    """A linear layer, a linear head and squared errors, whatever the size of the noise."""
    rows = 40_000
    with seeded("row"):
        x, target = torch.randn(1, 5, dtype=D), torch.randn(1, 4, dtype=D)
    layers = [*make_net(5, 16)[:1], nn.Identity()]
    x, y = x.expand(rows, 5), target.expand(rows, 4)
    task = Task(loss="mse").bind((4,), D, None)
    spec, block, micro_batch = first_block(objective, layers, x, y, task)
    mean = estimates(objective, spec, block, micro_batch).mean(0)
    exact = sample_gradients(block, micro_batch)[0]
    assert float((mean - exact).norm() / exact.norm()) < 0.05


def test_small_noise_measures_the_derivative(batch: tuple[Tensor, Tensor]) -> None:
    """Both objectives draw the same noise."""
    results = []
    for objective in (
        ForwardGradient(perturbations=2),
        Ulr(perturbations=2, noise=1e-4, antithetic=True),
    ):
        spec, block, micro_batch = first_block(objective, make_net(5, 7, 3), *batch)
        results.append(estimates(objective, spec, block, micro_batch))
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)


def test_weights_learn_the_derivative_along_their_noise(batch: tuple[Tensor, Tensor]) -> None:
    """g = <grad L, v> v over the weights of a block: one v for the whole update."""
    objective, net = ForwardGradient(perturb="parameters"), [make_net(5, 7), make_net(7, 4)]
    blocks = build_blocks(objective, net, batch[0], 4)
    micro_batches = train_micro_batch(objective, blocks, *batch, loss_scale=0.5)
    for (_, block), micro_batch in zip(blocks, micro_batches, strict=True):
        weights = [p for name, p in block.parameters.items() if name.startswith("l")]
        outputs = nn.Sequential(*block.layers.values())(micro_batch.x)
        head = block.head or nn.Identity()
        exact = torch.autograd.grad(0.5 * cross_entropy(head(outputs), batch[1]), weights)
        noise = [
            micro_batch.row_random.generate_shared(
                f"perturbation 0 {name}",
                lambda g, p=p: torch.randn(p.shape, dtype=D, generator=g),
            )
            for name, p in block.parameters.items()
            if name.startswith("l")
        ]
        change = sum((g * v).sum() for g, v in zip(exact, noise, strict=True))
        ours = [p.grad for p in weights]
        torch.testing.assert_close(ours, [change * v for v in noise], rtol=1e-10, atol=1e-14)
        norm = sum(v.square().sum() for v in noise)
        assert float(micro_batch.metrics[SQUARE]) > 0
        assert norm > 0


@pytest.mark.parametrize("objective", [ForwardGradient(), Ulr()])
def test_the_last_layer_and_heads_learn_exact_gradients(
    objective: PerturbedHead, batch: tuple[Tensor, Tensor]
) -> None:
    net = [make_net(5, 7), [*make_net(7, 6), nn.Linear(6, 4).to(D)]]
    blocks = build_blocks(objective, net, batch[0], 4)
    micro_batches = train_micro_batch(objective, blocks, *batch)
    h = [micro_batch.y for micro_batch in micro_batches]
    head, classifier = blocks[0][1].head, net[1][-1]
    assert head is not None
    assert isinstance(classifier, nn.Linear)
    losses = [cross_entropy(head(h[0]), batch[1])]
    inner = nn.Sequential(*net[1][:-1])(h[0]).detach()
    losses.append(cross_entropy(classifier(inner), batch[1]))
    assert [m.loss for m in micro_batches] == [loss.detach() for loss in losses]
    for module, loss in zip((head, classifier), losses, strict=True):
        ours = [p.grad for p in module.parameters()]
        expected = torch.autograd.grad(loss, list(module.parameters()))
        torch.testing.assert_close(ours, list(expected), rtol=1e-12, atol=1e-15)
    estimate = net[1][0].weight.grad
    exact = torch.autograd.grad(
        cross_entropy(nn.Sequential(*net[1])(h[0]), batch[1]), net[1][0].weight
    )[0]
    assert not torch.allclose(estimate, exact, rtol=0.1)


class Steps(torch.autograd.Function):
    """Steps, without a derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (4 * x).round()


class Stepped(nn.Module):
    """The layer of these steps."""

    out_features = 7

    def forward(self, input: Tensor) -> Tensor:
        steps: Tensor = Steps.apply(input)
        return steps


def test_likelihood_ratios_need_no_derivative(batch: tuple[Tensor, Tensor]) -> None:
    """On a mean over many equal rows, which the noise smooths; forward gradients refuse steps."""
    layers: list[nn.Module] = [make_net(5, 7)[0], Stepped(), nn.Identity()]
    x, y = batch[0][:1].expand(5000, 5), batch[1][:1].expand(5000)
    objective = Ulr(noise=0.5, antithetic=True)
    spec, block, micro_batch = first_block(objective, layers, x, y)
    steps = estimates(objective, spec, block, micro_batch).mean(0)
    smooth = first_block(objective, [layers[0], Fourfold(), nn.Identity()], x, y)
    expected = sample_gradients(*smooth[1:])[0]
    assert float(torch.cosine_similarity(steps, expected, 0)) > 0.7
    with refuses(ConfigError, "objective.no-forward-mode"):
        estimates(ForwardGradient(), *first_block(ForwardGradient(), layers, x[:2], y[:2]))


class Fourfold(Stepped):
    """The line through the steps."""

    def forward(self, input: Tensor) -> Tensor:
        return 4 * input


class Attention(Stepped):
    """Attention of a sample's numbers to each other."""

    def forward(self, input: Tensor) -> Tensor:
        q = input[:, None, :, None]
        return scaled_dot_product_attention(q, q, q).flatten(1)


def test_attention_has_tangents(batch: tuple[Tensor, Tensor]) -> None:
    """Its fused kernel has none."""
    layers: list[nn.Module] = [make_net(5, 7)[0], Attention(), nn.Identity()]
    objective = ForwardGradient()
    spec, block, micro_batch = first_block(objective, layers, *batch)
    forward = PerturbedForward(objective, spec, block, micro_batch, leaf_modules(block.layers))
    v = torch.ones(6, 7, dtype=D)
    change = objective.loss_changes(forward, {"l00": v}, micro_batch)
    expected = sample_gradients(block, micro_batch).sum(1)
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["forward-gradient", "ulr"])
def test_impossible_settings_are_refused_at_plan_time(name: str) -> None:
    with refuses(ConfigError, "objective.perturbations-too-few"):
        tiny.run(objective={"name": name, "perturbations": 0})
    if name == "ulr":
        with refuses(ConfigError, "objective.scale-not-positive"):
            tiny.run(objective={"name": name, "noise": 0.0})


class Framed(nn.Module):
    """A module with parameters of its own before and behind a linear layer."""

    out_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 5)
        self.scale, self.shift = (nn.Parameter(torch.randn(size)) for size in (7, 5))

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(input * self.scale) + self.shift


def test_a_basis_gives_every_weight_its_gradient(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a module around another one, too."""
    with seeded("framed"):
        layers = [make_net(5, 7)[0], nn.Tanh(), Framed().to(D), nn.Tanh()]
    first: dict[str, int] = {}

    def draw(_self: object, _batch: object, number: int, name: str, z: Tensor) -> Tensor:
        first.setdefault(name, sum((7, 5, 5)[: len(first)]))
        basis = torch.eye(17, dtype=D)[number, first[name] : first[name] + z.shape[1]]
        return math.sqrt(17) * basis.expand_as(z)

    monkeypatch.setattr(ForwardGradient, "draw", draw)
    objective = ForwardGradient(perturbations=17)
    blocks = build_blocks(objective, [layers, [nn.Linear(5, 4).to(D)]], batch[0], 4)
    spec, block = blocks[0]
    rows = RowRandom(0, 0, 0, 6, 0, 6)
    micro_batch = MicroBatch(targets=batch[1], x=batch[0], row_random=rows, rng_key=(0, 0, 0))
    block.run_forward(micro_batch, needs_graph=False)
    block.backward(objective.backward_pairs(spec, block, micro_batch))
    assert block.head is not None
    loss = cross_entropy(block.head(nn.Sequential(*layers)(batch[0])), batch[1])
    exact = torch.autograd.grad(loss, block.trainable_parameters)
    ours = [parameter.grad for parameter in block.trainable_parameters]
    torch.testing.assert_close(ours, list(exact), rtol=1e-10, atol=1e-15)
