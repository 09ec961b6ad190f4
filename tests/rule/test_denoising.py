"""Blocks that denoise labels: inlets, losses against explicit formulas, and refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch, RowRandom
from dtrain.build import RankJob, build_rank
from dtrain.comm.backends.single import SingleBackend
from dtrain.comm.communicator import Comm
from dtrain.errors import ConfigError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.denoising_inlet import Inlet
from dtrain.objectives.forward import forward_micro_batch
from dtrain.objectives.noprop import signal_levels
from dtrain.planning.plan import make_plan
from tests import tiny
from tests.refusals import refuses

D = torch.float64
ROWS = 12


def build_job(objective: dict[str, Any], **changes: Any) -> RankJob:
    """Return a run of three blocks on one rank, ready to train."""
    run = tiny.run(objective=objective, partition={"cuts": [1, 2]}, **changes)
    return build_rank(make_plan(run, 1), Comm(SingleBackend()))


def forward(job: RankJob, index: int) -> tuple[BlockSpec, Block, MicroBatch]:
    """Run the forward of a block on random samples; return spec, block and micro-batch."""
    spec, block = job.plan.layout.block_specs[index], job.engine.blocks[index]
    generator = torch.Generator().manual_seed(index)
    micro_batch = MicroBatch(
        targets=torch.randint(0, 3, (ROWS,), generator=generator),
        samples=torch.randn(ROWS, 2, 5, generator=generator, dtype=D),
        row_random=RowRandom(3, index, 0, ROWS, 0, ROWS),
        task=job.plan.layout.task,
        training=True,
        loss_scale=0.25,
    )
    with job.engine.saved_tensors.record(micro_batch):
        forward_micro_batch(job.engine.objective, spec, block, micro_batch)
        block.run_forward(micro_batch)
    return spec, block, micro_batch


def loss_of(job: RankJob, forwarded: tuple[BlockSpec, Block, MicroBatch]) -> Tensor:
    """Return the loss of a block, scaled."""
    [(loss, factor)] = job.engine.objective.backward_pairs(*forwarded)
    assert factor == 0.25
    return loss


def draw(micro_batch: MicroBatch, name: str, *shape: int, uniform: bool = False) -> Tensor:
    """Return the noise of a block, drawn again."""
    make = torch.rand if uniform else torch.randn
    return micro_batch.row_random.generate(name, lambda n, g: make(n, *shape, generator=g, dtype=D))


# ---- prediction


CHAINS = [
    {"name": "noprop"},
    {"name": "noprop", "form": "flow", "steps": 2},
    {"name": "diffusion-blocks", "steps": 2},
    {"name": "diffusion-blocks", "loss": "squared-error"},
]


@pytest.mark.parametrize("objective", CHAINS)
def test_several_chains_predict_the_mean_of_their_probabilities(objective: dict[str, Any]) -> None:
    """The first is the only chain of chains = 1, and the others differ from it by their noise."""
    one, two, three = (predict(objective | {"chains": chains}) for chains in (1, 2, 3))
    second = 2 * two.exp() - one.softmax(1)
    torch.testing.assert_close(second.sum(1), torch.ones(ROWS, dtype=D))
    assert (second - one.softmax(1)).abs().max() > 1e-7
    third = 3 * three.exp() - 2 * two.exp()
    torch.testing.assert_close(third.sum(1), torch.ones(ROWS, dtype=D))
    assert (third - second).abs().max() > 1e-7


def test_no_noise_of_a_prediction_serves_two_chains() -> None:
    draws: list[tuple[int, str]] = []
    predict({"name": "noprop", "chains": 3}, draws)
    assert len(draws) == len(set(draws)) == 3 + 3 * 3  # a start, and a step of each block


class Recorded(RowRandom):
    """Random numbers that note the block and the name of every draw in `draws`."""

    draws: list[tuple[int, str]]

    def generate(self, name: str, make: Any) -> Tensor:
        """Note the name, and draw."""
        self.draws.append((self.block, name))
        return super().generate(name, make)


def predict(objective: dict[str, Any], draws: list[tuple[int, str]] | None = None) -> Tensor:
    """Return the scores (ROWS, 3) of the last block for random samples."""
    job = build_job(objective)
    samples = torch.randn(ROWS, 2, 5, generator=torch.Generator().manual_seed(1), dtype=D)
    received: dict[str, Tensor] = {}
    for index, spec in enumerate(job.plan.layout.block_specs):
        row_random = Recorded(3, index, 0, ROWS, 0, ROWS)
        row_random.draws = [] if draws is None else draws
        micro_batch = MicroBatch(
            targets=torch.zeros(ROWS, dtype=torch.int64),
            samples=samples,
            row_random=row_random,
            task=job.plan.layout.task,
            training=False,
        )
        micro_batch.received |= received
        block = job.engine.blocks[index]
        with torch.no_grad():
            forward_micro_batch(job.engine.objective, spec, block, micro_batch)
            block.run_forward(micro_batch)
            scores = job.engine.objective.predict(spec, block, micro_batch)
        received = micro_batch.received
    return scores


# ---- losses


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_block_of_noprop_learns_the_weighted_error_of_the_expected_code(index: int) -> None:
    job = build_job({"name": "noprop", "eta": 0.3})
    _, block, micro_batch = forwarded = forward(job, index)
    a = signal_levels(3, 0.99)
    clean, noise = one_hot(micro_batch.targets, 3).to(D), draw(micro_batch, "noise", 3)
    z = math.sqrt(a[index]) * clean + math.sqrt(1 - a[index]) * noise
    torch.testing.assert_close(micro_batch.x[:, 10:], z, rtol=1e-14, atol=1e-15)
    assert block.head is not None
    scores = micro_batch.y if index == 2 else block.head.outlet(micro_batch.y)  # type: ignore[operator]
    errors = (scores.softmax(1) - clean).square().sum(1)
    gain = a[index + 1] / (1 - a[index + 1]) - a[index] / (1 - a[index])
    expected = 3 / 2 * 0.3 * gain * errors.mean()
    if index == 2:
        end = math.sqrt(a[3]) * clean + math.sqrt(1 - a[3]) * draw(micro_batch, "end", 3)
        expected = expected + cross_entropy(block.head.classifier(end), micro_batch.targets)  # type: ignore[operator]
    torch.testing.assert_close(loss_of(job, forwarded), expected, rtol=1e-12, atol=0)


def test_flow_learns_the_velocity_from_noise_to_the_code() -> None:
    job = build_job({"name": "noprop", "form": "flow"})
    _, block, micro_batch = forwarded = forward(job, 1)
    clean, noise = one_hot(micro_batch.targets, 3).to(D), draw(micro_batch, "noise", 3)
    times = (1 + draw(micro_batch, "time", uniform=True)) / 3
    z = (1 - times[:, None]) * noise + times[:, None] * clean
    torch.testing.assert_close(micro_batch.x[:, 10:13], z, rtol=1e-14, atol=1e-15)
    assert block.head is not None
    errors = (block.head(micro_batch.y) - (clean - noise)).square().sum(1)
    torch.testing.assert_close(loss_of(job, forwarded), errors.mean(), rtol=1e-12, atol=0)


def test_the_weighted_squared_error_is_that_of_the_network_to_its_target() -> None:
    """lambda |c_skip z + c_out F - u|^2 = |F - (u - c_skip z) / c_out|^2, in EDM's notation."""
    objective = {"name": "diffusion-blocks", "loss": "squared-error", "width": 4}
    job = build_job(objective)
    spec, block, micro_batch = forwarded = forward(job, 1)
    edges = job.engine.objective.band_edges(3)  # type: ignore[attr-defined]
    sigma = (4 * micro_batch.x[:, 14:15]).exp()
    assert bool(((edges[1] <= sigma) & (sigma <= edges[2])).all())
    code = job.engine.objective.codes(spec)[micro_batch.targets]  # type: ignore[attr-defined]
    torch.testing.assert_close(code.square().mean(1), torch.full((ROWS,), 0.25, dtype=D))
    z, total = code + sigma * draw(micro_batch, "noise", 4), sigma**2 + 0.25
    torch.testing.assert_close(micro_batch.x[:, 10:14], z / total.sqrt(), rtol=1e-13, atol=1e-15)
    assert block.head is not None
    target = (code - 0.25 / total * z) / (0.5 * sigma / total.sqrt())
    expected = (block.head(micro_batch.y) - target).square().mean()
    torch.testing.assert_close(loss_of(job, forwarded), expected, rtol=1e-10, atol=0)


# ---- the inlet


@pytest.mark.parametrize(
    ("stem", "block", "code"),
    [
        ((7,), (7,), (3,)),
        ((4, 6, 6), (7,), (3,)),
        ((5, 8), (5, 8), (3,)),
        ((5, 8), (5, 6), (5, 3)),
        ((4, 6, 6), (4, 6, 6), (3,)),
        ((4, 6, 6), (8, 3, 3), (3,)),
        ((4, 6, 6), (4, 6, 6), (6, 6, 3)),
    ],
)
def test_an_inlet_returns_the_shape_of_the_block(
    stem: tuple[int, ...], block: tuple[int, ...], code: tuple[int, ...]
) -> None:
    """A code of a position changes the features of that position alone; samples do not mix."""
    inlet = Inlet(nn.Identity, stem, stem, False, code, block, 3)
    x = torch.randn(2, math.prod(stem) + math.prod(code) + 3)
    first = inlet(x)
    assert first.shape == (2, *block)
    x[0, math.prod(stem) + 1] += 1.0  # a number of the first position's code
    changed = (inlet(x) != first).flatten(1).any(1), (inlet(x) != first)[0]
    assert changed[0].tolist() == [True, False]
    if len(code) > 1:
        by_position = changed[1].any(0) if len(block) > 2 else changed[1].any(1)
        assert by_position.flatten().nonzero().flatten().tolist() == [0]


# ---- refusals


def complex_samples() -> tuple[np.ndarray, ...]:
    """Return samples of complex numbers."""
    x, y, x_test, y_test = tiny.samples()
    return x * 1j, y, x_test * 1j, y_test


def pixels() -> tuple[np.ndarray, ...]:
    """Return images with a label for each pixel."""
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4))
    return x, np.abs(x[:, 0] * 2).astype(np.int64) % 3, x, np.abs(x[:, 0] * 2).astype(np.int64) % 3


def coarse() -> nn.Sequential:
    """Return a net whose second block has fewer positions."""
    up = nn.Upsample(scale_factor=2)
    return nn.Sequential(nn.Conv2d(1, 4, 1), nn.AvgPool2d(2), nn.Conv2d(4, 3, 1), up)


def images_after_vectors() -> nn.Sequential:
    """Return a net whose second block takes images, and whose first layer returns vectors."""
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(10, 8))
    images = nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 2, 1))
    return nn.Sequential(vectors, images, nn.Flatten(), nn.Linear(16, 3))


class Complex(nn.Module):
    """A layer from complex samples to real numbers."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.view_as_real(input).flatten(1)


def complex_net() -> nn.Sequential:
    """Return a net for complex samples."""
    return nn.Sequential(Complex(), nn.Linear(20, 6), nn.Linear(6, 3))


class Residual(nn.Module):
    """A net that is no chain of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head((h + self.second(h)).flatten(1))


def tied() -> nn.Sequential:
    """Return a net with a weight in two blocks."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 3))
    net[2].weight = net[1].weight  # type: ignore[union-attr, unused-ignore]
    return net


@pytest.mark.parametrize("name", ["noprop", "diffusion-blocks"])
@pytest.mark.parametrize(
    ("data", "net", "cut", "key"),
    [
        ("samples", "images_after_vectors", 2, "objective.stem-does-not-fit"),
        ("samples", "Residual", 1, "objective.needs-chain"),
        ("samples", "tied", 2, "objective.ties-replaced"),
        ("complex_samples", "complex_net", 1, "objective.complex-samples"),
        ("pixels", "coarse", 2, "objective.positions-differ"),
    ],
)
def test_what_does_not_fit_is_refused_at_plan_time(
    name: str, data: str, net: str, cut: int, key: str
) -> None:
    module = "tests.tiny" if data == "samples" else __name__
    changes = {"data__name": f"{module}:{data}", "model": {"name": f"{__name__}:{net}"}}
    with refuses(ConfigError, key):
        make_plan(tiny.run(objective__name=name, partition={"cuts": [cut]}, **changes), 1)


def test_weights_of_the_model_are_refused() -> None:
    model = {"name": "mlp", "widths": [9, 7, 6], "weights": "weights.pt"}
    with refuses(ConfigError, "objective.weights-replaced"):
        make_plan(tiny.run(objective__name="noprop", model=model), 1)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"width": 1}, "objective.width-too-small"),
        ({"name": "noprop", "final-level": 1.0}, "objective.final-level-out-of-range"),
        ({"name": "noprop", "steps": 2}, "objective.steps-without-flow"),
        ({"name": "noprop", "eta": 0.0}, "objective.scale-not-positive"),
        ({"steps": 0}, "objective.steps-too-few"),
        ({"sigma-max": 0.001}, "objective.sigma-max-too-small"),
        ({"p-mean": 60.0}, "objective.band-without-mass"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], key: str) -> None:
    with refuses(ConfigError, key):
        tiny.run(objective={"name": "diffusion-blocks"} | fields)


def test_both_are_in_the_dict() -> None:
    assert all(OBJECTIVES[name].needs_block_layers for name in ("noprop", "diffusion-blocks"))
