"""InfoPro: lambdas, decoder, contrasts and the laws, against formulas that are written out."""

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
from dtrain.errors import DtrainError
from dtrain.models.image_layers import Convolution, PooledLinear
from dtrain.objectives.base import VOTES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common.reconstruction import ReconstructionHead
from dtrain.objectives.infopro import InfoPro, contrastive_loss
from dtrain.objectives.local_head import LocalHead
from dtrain.rng import seeded

D = torch.float64
TASK = BlockSpec(0, 3, (3, 8, 8), (6, 4, 4), D, 5, (3, 8, 8), has_raw_samples=True)


def step(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def made(objective: Any, task: BlockSpec = TASK) -> Block:
    """Return a block for images, its layers and head drawn alike for all objectives."""
    with seeded("layers"):
        last = PooledLinear(3, task.classes) if task.is_last else Convolution(3, 6, "none", 1, True)
    with seeded("head"):
        helper = objective.build_head(task)
    return Block(task.index, {"l": last.to(D)}, helper and helper.to(D), step)


def lived(block: Block, rows: int = 7, image: bool = True) -> MicroBatch:
    with seeded("batch", rows):
        x, y = torch.randn(rows, 3, 8, 8, dtype=D), torch.randint(0, 5, (rows,))
        inside = torch.rand(rows, 3, 8, 8, dtype=D)
    return MicroBatch(
        x, block.forward(x, ()), y, 0.25, samples=x, raw_samples=inside if image else None
    )


def parts(block: Block) -> ReconstructionHead:
    assert isinstance(block.head, ReconstructionHead)
    return block.head


# The lambdas


def test_lambdas_go_linearly_from_the_first_block_to_the_last_but_one() -> None:
    objective = InfoPro(lambda_first=(5.0, 0.05), lambda_last=(0.2, 0.5))
    found = [objective.lambdas(replace(TASK, index=b, blocks=16)) for b in range(15)]
    assert (found[0], found[-1]) == ((5.0, 0.05), (0.2, 0.5))
    assert found[7] == pytest.approx((2.6, 0.275))
    steps = {round(b[0] - a[0], 12) for a, b in itertools.pairwise(found)}
    assert len(steps) == 1
    assert objective.lambdas(replace(TASK, blocks=2)) == (5.0, 0.05)
    assert InfoPro().lambdas(replace(TASK, blocks=2)) == (5.0, 0.5)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"lambda_first": (5.0,)}, r"lambda-first = \[5.0\]: give two"),
        ({"lambda_last": (1.0, -1.0)}, r"lambda-last = \[1.0, -1.0\]"),
        ({"lambda_last": (math.inf, 1.0)}, "lambda-last"),
        ({"lambda_last": (0.0, 0.0)}, r"lambda-last = .* learn nothing"),
        ({"temperature": 0.0}, "temperature = 0"),
        ({"features": 0}, "features = 0"),
    ],
)
def test_wrong_numbers_are_refused(fields: Any, text: str) -> None:
    with pytest.raises(DtrainError, match=text):
        InfoPro(**fields)


@pytest.mark.parametrize("head", ["1c2f", "greedy"])
def test_without_reconstruction_it_is_the_local_head(head: Any) -> None:
    """Bit for bit: loss and gradients; nothing is decoded, so nothing is read."""
    objective = InfoPro(head, lambda_first=(0.0, 1.0))
    blocks = made(objective), made(LocalHead(head))
    lives = [lived(block) for block in blocks]
    for each, block, live in zip((objective, LocalHead(head)), blocks, lives, strict=True):
        block.backward(each.backward_pairs(TASK, block, live))
    assert lives[0].loss is not None
    assert lives[1].loss is not None
    assert torch.equal(lives[0].loss, lives[1].loss)
    assert all(map(torch.equal, *(block.gradients() for block in blocks)))
    assert len(blocks[0].trainable_parameters) == len(blocks[1].trainable_parameters)
    third = replace(TASK, index=2, blocks=4)
    assert not InfoPro(head, lambda_last=(0.0, 1.0)).needs_samples(third, "train")
    torch.testing.assert_close(
        objective.predict(TASK, blocks[0], lives[0]),
        LocalHead(head).predict(TASK, blocks[1], lives[1]),
    )


def test_without_classification_there_are_no_scores() -> None:
    objective = InfoPro(lambda_first=(1.0, 0.0))
    block = made(objective)
    live = lived(block)
    block.backward(objective.backward_pairs(TASK, block, live))
    assert list(live.metrics) == ["reconstruction"]
    assert objective.predict(TASK, block, live) is None
    assert parts(block).head is None


# The decoder


@pytest.mark.parametrize("image", [True, False], ids=["known range", "unknown range"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_loss_written_out(image: bool, norm: Any) -> None:
    """With functions of torch alone, pulled at the micro-batch's share; gradients too."""
    objective = InfoPro(norm=norm)
    block, twin = made(objective), made(objective)
    live = lived(block, image=image)
    [(loss, force)] = objective.backward_pairs(TASK, block, live)
    y = twin.forward(live.x, ())
    w = list(parts(twin).decoder.parameters())

    def normed(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional.batch_norm(z, None, None, scale, shift, training=True)

    large = functional.interpolate(y, (8, 8), mode="bilinear", align_corners=True)
    z = functional.conv2d(large, w[0], w[1], padding=1)
    assert z.shape[1] == 12
    z = (normed(z, w[2], w[3]) if norm == "batch" else z).relu()
    out = functional.conv2d(z, w[-2], w[-1], padding=1)
    kept = functional.mse_loss(out, live.samples)
    if image:
        kept = functional.binary_cross_entropy(out.sigmoid(), live.raw_samples)
    told = cross_entropy(parts(twin).head(y), live.targets)
    torch.testing.assert_close(loss, 5 * kept + 0.5 * told)
    assert float(force) == 0.25
    assert live.loss == loss
    torch.testing.assert_close(live.metrics, {"ce": told.detach(), "reconstruction": kept.detach()})
    block.backward([(loss, force)])
    (0.25 * (5 * kept + 0.5 * told)).backward()
    for ours, wanted in zip(block.gradients(), twin.gradients(), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_the_head_of_one_convolution_and_two_linear_layers() -> None:
    head = parts(made(InfoPro())).head
    shapes = [tuple(p.shape) for p in head.parameters() if p.dim() > 1]
    assert shapes == [(12, 6, 3, 3), (128, 12), (5, 128)]
    flat = parts(made(InfoPro(), replace(TASK, output_shape=(9,)))).head
    shapes = [tuple(p.shape) for p in flat.parameters() if p.dim() > 1]
    assert shapes == [(128, 9), (5, 128)]


@pytest.mark.parametrize(
    ("outputs", "sample"), [((9,), (3, 8, 8)), ((6, 4, 4), (7,)), ((9,), (7,))]
)
def test_flat_features_or_samples_are_decoded_by_one_linear_layer(
    outputs: tuple[int, ...], sample: tuple[int, ...]
) -> None:
    decoder = parts(
        made(InfoPro(), replace(TASK, output_shape=outputs, sample_shape=sample))
    ).decoder
    assert decoder is not None
    weight, bias = decoder.parameters()
    y = torch.randn(4, *outputs, dtype=D)
    wanted = (y.flatten(1) @ weight.T + bias).view(4, *sample)
    torch.testing.assert_close(decoder(y), wanted)


def test_twelve_channels_fall_into_any_groups() -> None:
    decoder = parts(made(InfoPro(norm="group", groups=3))).decoder
    norms = [each for each in decoder.modules() if isinstance(each, nn.GroupNorm)]
    assert [each.num_groups for each in norms] == [3]
    eight = InfoPro(norm="group").build_head(replace(TASK, output_shape=(8, 4, 4)))
    norms = [each for each in eight.modules() if isinstance(each, nn.GroupNorm)]
    assert [each.num_groups for each in norms] == [8, 4]


# Contrasts


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
    wanted = torch.stack(terms).sum()
    found = contrastive_loss(z, y, 0.07)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(each, z)[0] for each in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_a_micro_batch_without_partners_teaches_nothing() -> None:
    z = normalize(torch.randn(3, 6, dtype=D)).requires_grad_()
    loss = contrastive_loss(z, torch.arange(3), 0.07)
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_contrasts_have_no_class_scores_and_couple_samples() -> None:
    objective = InfoPro(loss="contrast")
    block = made(objective)
    live = lived(block)
    [(loss, force)] = objective.backward_pairs(TASK, block, live)
    block.backward([(loss, force)])
    assert sorted(live.metrics) == ["contrast", "reconstruction"]
    out = parts(block).head(live.y)
    assert out.shape == (7, 128)
    assert objective.predict(TASK, block, live) is None
    last = replace(TASK, index=2, output_shape=(5,))
    assert [objective.couples_samples(each) for each in (TASK, last)] == [True, False]
    assert not InfoPro().couples_samples(TASK)
    assert objective.predict(last, made(objective, last), live) is live.y


def test_too_few_partners_are_told_with_numbers() -> None:
    tasks = [replace(TASK, index=block) for block in range(3)]
    [told] = InfoPro(loss="contrast").warnings(tasks, 16)
    assert "16 samples of 5 classes: 3.2 of a class" in told
    assert "20 samples" in told
    assert InfoPro(loss="contrast").warnings(tasks, 20) == []
    assert InfoPro().warnings(tasks, 2) == []
    assert InfoPro(loss="contrast").warnings([replace(TASK, blocks=1)], 2) == []


# What it reads and sends


def test_all_but_the_last_read_in_training_and_the_first_alone_in_prediction() -> None:
    tasks = [replace(TASK, index=block) for block in range(3)]
    assert [InfoPro().needs_samples(task, "train") for task in tasks] == [True, True, False]
    assert [InfoPro().needs_samples(task, "predict") for task in tasks] == [True, False, False]
    assert InfoPro().needs_samples(replace(TASK, blocks=1), "train")


def test_votes_ride_in_prediction_alone() -> None:
    names = [[r.name for r in InfoPro().routes(3, mode)] for mode in ("train", "predict")]
    assert names == [["activation"] * 2, ["activation"] * 2 + [VOTES] * 2]


def test_one_block_is_backprop() -> None:
    task = replace(TASK, blocks=1, output_shape=(5,))
    ours, theirs = made(InfoPro(), task), made(InfoPro(), task)
    assert ours.head is None
    live = lived(ours)
    live.loss_scale = 1.0
    ours.backward(InfoPro().backward_pairs(task, ours, live))
    cross_entropy(theirs.forward(live.x, ()), live.targets).backward()
    assert all(map(torch.equal, ours.gradients(), theirs.gradients()))
