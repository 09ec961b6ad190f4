"""InfoPro: lambdas, decoder, contrastive loss and the laws, against explicit formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, normalize

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.models.image_layers import Convolution, PooledLinear
from dtrain.objectives.base import VOTES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.reconstruction import ReconstructionHead
from dtrain.objectives.infopro import InfoPro, contrastive_loss
from dtrain.objectives.local_head import LocalHead
from dtrain.rng import seeded
from tests.refusals import refuses
from tests.rule.warning_numbers import numbers_in

D = torch.float64
SPEC = BlockSpec(0, 3, (3, 8, 8), (6, 4, 4), D, 5, (3, 8, 8), has_raw_samples=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def make_block(objective: Any, spec: BlockSpec = SPEC) -> Block:
    """Return a block for images, with layers and head of the same seeds for all objectives."""
    with seeded("layers"):
        layer = (
            PooledLinear(3, spec.classes) if spec.is_last else Convolution(3, 6, "none", 1, True)
        )
    with seeded("head"):
        head = objective.make_head(spec)
    return Block(spec.index, {"l": layer.to(D)}, head and head.to(D), sgd)


def make_micro_batch(block: Block, known_range: bool = True) -> MicroBatch:
    with seeded("batch", 7):
        x, y = torch.randn(7, 3, 8, 8, dtype=D), torch.randint(0, 5, (7,))
        raw = torch.rand(7, 3, 8, 8, dtype=D)
    return MicroBatch(
        x, block.forward(x, ()), y, 0.25, samples=x, raw_samples=raw if known_range else None
    )


def head_of(block: Block) -> ReconstructionHead:
    assert isinstance(block.head, ReconstructionHead)
    return block.head


# The lambdas


def test_lambdas_go_linearly_from_the_first_block_to_the_last_but_one() -> None:
    objective = InfoPro(lambda_first=(5.0, 0.05), lambda_last=(0.2, 0.5))
    lambdas = [objective.lambdas(replace(SPEC, index=b, blocks=16)) for b in range(15)]
    assert (lambdas[0], lambdas[-1]) == ((5.0, 0.05), (0.2, 0.5))
    assert lambdas[7] == pytest.approx((2.6, 0.275))
    differences = {round(b[0] - a[0], 12) for a, b in itertools.pairwise(lambdas)}
    assert len(differences) == 1
    assert objective.lambdas(replace(SPEC, blocks=2)) == (5.0, 0.05)
    assert InfoPro().lambdas(replace(SPEC, blocks=2)) == (5.0, 0.5)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"lambda_first": (5.0,)}, "objective.lambda-invalid"),
        ({"lambda_last": (1.0, -1.0)}, "objective.lambda-invalid"),
        ({"lambda_last": (math.inf, 1.0)}, "objective.lambda-invalid"),
        ({"lambda_last": (0.0, 0.0)}, "objective.lambda-zero"),
        ({"temperature": 0.0}, "objective.temperature-not-positive"),
        ({"features": 0}, "objective.features-too-small"),
    ],
)
def test_wrong_numbers_are_refused(fields: Any, key: str) -> None:
    with refuses(ConfigError, key):
        InfoPro(**fields)


@pytest.mark.parametrize("head", ["1c2f", "greedy"])
def test_without_reconstruction_it_is_the_local_head(head: Any) -> None:
    """Bit for bit: loss and gradients; without a decoder no samples are read."""
    objectives = InfoPro(head, lambda_first=(0.0, 1.0)), LocalHead(head)
    blocks = [make_block(objective) for objective in objectives]
    micro_batches = [make_micro_batch(block) for block in blocks]
    for objective, block, micro_batch in zip(objectives, blocks, micro_batches, strict=True):
        block.backward(objective.backward_pairs(SPEC, block, micro_batch))
    assert micro_batches[0].loss is not None
    assert micro_batches[1].loss is not None
    assert torch.equal(micro_batches[0].loss, micro_batches[1].loss)
    assert all(map(torch.equal, *(block.gradients() for block in blocks)))
    assert len(blocks[0].trainable_parameters) == len(blocks[1].trainable_parameters)
    third = replace(SPEC, index=2, blocks=4)
    assert not InfoPro(head, lambda_last=(0.0, 1.0)).needs_samples(third, "train")
    predictions = map(lambda o, b, m: o.predict(SPEC, b, m), objectives, blocks, micro_batches)
    torch.testing.assert_close(*predictions)


def test_without_classification_there_are_no_scores() -> None:
    objective = InfoPro(lambda_first=(1.0, 0.0))
    block = make_block(objective)
    micro_batch = make_micro_batch(block)
    block.backward(objective.backward_pairs(SPEC, block, micro_batch))
    assert list(micro_batch.metrics) == ["reconstruction"]
    assert objective.predict(SPEC, block, micro_batch) is None
    assert head_of(block).head is None


# The decoder


@pytest.mark.parametrize("known_range", [True, False], ids=["known range", "unknown range"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_loss_is_the_formula(known_range: bool, norm: Any) -> None:
    """With functions of torch alone, scaled by `loss_scale`; gradients too."""
    objective = InfoPro(norm=norm)
    block, twin = make_block(objective), make_block(objective)
    micro_batch = make_micro_batch(block, known_range)
    [(loss, factor)] = objective.backward_pairs(SPEC, block, micro_batch)
    y = twin.forward(micro_batch.x, ())
    w = list(head_of(twin).decoder.parameters())

    def batch_norm(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.batch_norm(z, None, None, scale, shift, training=True)

    large = functional.interpolate(y, (8, 8), mode="bilinear", align_corners=True)
    z = functional.conv2d(large, w[0], w[1], padding=1)
    assert z.shape[1] == 12
    z = (batch_norm(z, w[2], w[3]) if norm == "batch" else z).relu()
    logits = functional.conv2d(z, w[-2], w[-1], padding=1)
    reconstruction = functional.mse_loss(logits, micro_batch.samples)
    if known_range:
        reconstruction = functional.binary_cross_entropy(logits.sigmoid(), micro_batch.raw_samples)
    ce = cross_entropy(head_of(twin).head(y), micro_batch.targets)
    torch.testing.assert_close(loss, 5 * reconstruction + 0.5 * ce)
    assert float(factor) == 0.25
    assert micro_batch.loss == loss
    torch.testing.assert_close(
        micro_batch.metrics, {"ce": ce.detach(), "reconstruction": reconstruction.detach()}
    )
    block.backward([(loss, factor)])
    (0.25 * (5 * reconstruction + 0.5 * ce)).backward()
    torch.testing.assert_close(block.gradients(), twin.gradients())


def test_the_head_of_one_convolution_and_two_linear_layers() -> None:
    head = head_of(make_block(InfoPro())).head
    shapes = [tuple(p.shape) for p in head.parameters() if p.dim() > 1]
    assert shapes == [(12, 6, 3, 3), (128, 12), (5, 128)]
    flat = head_of(make_block(InfoPro(), replace(SPEC, output_shape=(9,)))).head
    shapes = [tuple(p.shape) for p in flat.parameters() if p.dim() > 1]
    assert shapes == [(128, 9), (5, 128)]


@pytest.mark.parametrize(
    ("output_shape", "sample_shape"), [((9,), (3, 8, 8)), ((6, 4, 4), (7,)), ((9,), (7,))]
)
def test_flat_features_or_samples_are_decoded_by_one_linear_layer(
    output_shape: tuple[int, ...], sample_shape: tuple[int, ...]
) -> None:
    decoder = head_of(
        make_block(InfoPro(), replace(SPEC, output_shape=output_shape, sample_shape=sample_shape))
    ).decoder
    assert decoder is not None
    weight, bias = decoder.parameters()
    y = torch.randn(4, *output_shape, dtype=D)
    expected = (y.flatten(1) @ weight.T + bias).view(4, *sample_shape)
    torch.testing.assert_close(decoder(y), expected)


def test_twelve_channels_have_at_most_the_configured_groups() -> None:
    decoder = head_of(make_block(InfoPro(norm="group", groups=3))).decoder
    norms = [m for m in decoder.modules() if isinstance(m, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [3]
    eight = InfoPro(norm="group").build_head(replace(SPEC, output_shape=(8, 4, 4)))
    norms = [m for m in eight.modules() if isinstance(m, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [8, 4]


# The contrastive loss


def test_the_contrast_is_the_formula() -> None:
    """Equation 2 of Khosla et al., row by row, one row without a partner; and its gradient."""
    with seeded("z"):
        z = normalize(torch.randn(8, 6, dtype=D)).requires_grad_()
    y = torch.tensor([0, 1, 0, 2, 1, 0, 1, 3])
    terms = []
    for i in range(8):
        others = [a for a in range(8) if a != i]
        below = sum(torch.exp(z[i] @ z[a] / 0.07) for a in others)
        partners = [p for p in others if y[p] == y[i]]
        for p in partners:
            terms.append(-torch.log(torch.exp(z[i] @ z[p] / 0.07) / below) / len(partners) / 8)
    expected = torch.stack(terms).sum()
    loss = contrastive_loss(z, y, 0.07)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value, z)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_a_micro_batch_without_partners_teaches_nothing() -> None:
    z = normalize(torch.randn(3, 6, dtype=D)).requires_grad_()
    loss = contrastive_loss(z, torch.arange(3), 0.07)
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_contrasts_have_no_class_scores_and_couple_samples() -> None:
    objective = InfoPro(loss="contrast")
    block = make_block(objective)
    micro_batch = make_micro_batch(block)
    [(loss, factor)] = objective.backward_pairs(SPEC, block, micro_batch)
    block.backward([(loss, factor)])
    assert sorted(micro_batch.metrics) == ["contrast", "reconstruction"]
    assert head_of(block).head(micro_batch.y).shape == (7, 128)
    assert objective.predict(SPEC, block, micro_batch) is None
    last = replace(SPEC, index=2, output_shape=(5,))
    assert [objective.couples_samples(spec) for spec in (SPEC, last)] == [True, False]
    assert not InfoPro().couples_samples(SPEC)
    assert objective.predict(last, make_block(objective, last), micro_batch) is micro_batch.y


def test_too_few_partners_are_warned_of_with_numbers() -> None:
    specs = [replace(SPEC, index=block) for block in range(3)]
    [warning] = InfoPro(loss="contrast").warnings(specs, 16)
    assert {"16", "5", "3.2", "4", "20"} <= numbers_in(warning)
    assert InfoPro(loss="contrast").warnings(specs, 20) == []
    assert InfoPro().warnings(specs, 2) == []
    assert InfoPro(loss="contrast").warnings([replace(SPEC, blocks=1)], 2) == []


# Samples and messages


def test_all_but_the_last_read_samples_in_training_and_only_the_first_in_prediction() -> None:
    specs = [replace(SPEC, index=block) for block in range(3)]
    assert [InfoPro().needs_samples(spec, "train") for spec in specs] == [True, True, False]
    assert [InfoPro().needs_samples(spec, "predict") for spec in specs] == [True, False, False]
    assert InfoPro().needs_samples(replace(SPEC, blocks=1), "train")


def test_votes_are_sent_in_prediction_only() -> None:
    names = [[r.name for r in InfoPro().routes(3, mode)] for mode in ("train", "predict")]
    assert names == [["activation"] * 2, ["activation"] * 2 + [VOTES] * 2]


def test_one_block_is_backprop() -> None:
    spec = replace(SPEC, blocks=1, output_shape=(5,))
    ours, theirs = make_block(InfoPro(), spec), make_block(InfoPro(), spec)
    assert ours.head is None
    micro_batch = make_micro_batch(ours)
    micro_batch.loss_scale = 1.0
    ours.backward(InfoPro().backward_pairs(spec, ours, micro_batch))
    cross_entropy(theirs.forward(micro_batch.x, ()), micro_batch.targets).backward()
    assert all(map(torch.equal, ours.gradients(), theirs.gradients()))
