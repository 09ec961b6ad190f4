"""The objective `f3`: errors of the epoch before, and their table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from dtrain.block.block import Block
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.dfa import Dfa
from dtrain.objectives.drtp import Drtp
from dtrain.objectives.f3 import DELAYED_ERROR, F3
from dtrain.rng import seeded
from tests.rule.blocks_in_process import SAMPLES, D, build_blocks, train_micro_batch
from tests.rule.warning_numbers import numbers_in

Blocks = list[tuple[BlockSpec, Block]]
every_variant = pytest.mark.parametrize(
    "fields", [{}, {"error": "output"}, {"one_hot": True}, {"error": "output", "one_hot": True}]
)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return data, labels, and their indices among 30 samples."""
    with seeded("batch"):
        x, y = torch.randn(12, 6, dtype=D), torch.randint(0, 4, (12,))
        return x, y, torch.randperm(SAMPLES)[:12]


def make_net(objective: Objective, x: Tensor, *sizes: int) -> Blocks:
    """Return the blocks of a perceptron with tanh and hidden layers of `sizes`."""
    with seeded("net"):
        layers = [nn.Linear(*size).to(D) for size in zip((6, *sizes), (*sizes, 4), strict=True)]
    parts = [[layer, nn.Tanh()] for layer in layers[:-1]]
    return build_blocks(objective, [*parts, layers[-1:]], x, 4)


def end_segment(objective: Objective, blocks: Blocks) -> None:
    """End a segment on one rank."""
    for spec, block in blocks:
        objective.solve(spec, block)
    for _, block in blocks:
        block.head.answers.copy_(blocks[-1][1].head.answers)


def gradients(blocks: Blocks) -> list[Tensor]:
    """Return the gradients of all blocks, and clear them."""
    clones = [gradient.clone() for _, block in blocks for gradient in block.gradients()]
    for _, block in blocks:
        for parameter in block.trainable_parameters:
            parameter.grad = None
    return clones


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-16)


@every_variant
def test_the_first_epoch_is_drtp(fields: dict[str, Any], batch: tuple[Tensor, ...]) -> None:
    x, y, indices = batch
    blocks, others = make_net(F3(**fields), x, 9, 7), make_net(Drtp(), x, 9, 7)
    micro_batches = train_micro_batch(F3(**fields), blocks, x, y, indices=indices)
    train_micro_batch(Drtp(), others, x, y, indices=indices)
    assert_close(gradients(blocks), gradients(others))
    assert all(float(earlier.metrics[DELAYED_ERROR]) == 1 for earlier in micro_batches[:-1])


def test_with_constant_weights_it_is_dfa_with_the_negative_matrix(
    batch: tuple[Tensor, ...],
) -> None:
    """Onehot - softmax is the negative of DFA's error."""
    x, y, indices = batch
    objective, dfa = F3(), Dfa(normalised=False)
    blocks, others = make_net(objective, x, 9, 7), make_net(dfa, x, 9, 7)
    for (_, block), (_, other) in zip(blocks[:-1], others[:-1], strict=True):
        other.head.feedback.copy_(-block.head.feedback)
    train_micro_batch(objective, blocks, x, y, indices=indices)
    before = gradients(blocks)
    end_segment(objective, blocks)
    train_micro_batch(objective, blocks, x, y, loss_scale=0.5, indices=indices)
    train_micro_batch(dfa, others, x, y, loss_scale=0.5)
    second = gradients(blocks)
    assert_close(second, gradients(others))
    assert not torch.allclose(before[0] / 2, second[0], rtol=0.1)


@every_variant
def test_the_cotangent_is_from_the_error_of_the_epoch_before(
    fields: dict[str, Any], batch: tuple[Tensor, ...]
) -> None:
    """By formula, for samples of which the model has seen some, in another order."""
    x, y, indices = batch
    objective = F3(**fields)
    blocks = make_net(objective, x, 9)
    last = train_micro_batch(objective, blocks, x[:8], y[:8], indices=indices[:8])[-1]
    gradients(blocks)
    end_segment(objective, blocks)
    with torch.no_grad():
        blocks[1][1].layers["l10"].weight.mul_(2)
    again = torch.tensor([11, 3, 0, 9, 7])
    first_batch, _ = train_micro_batch(objective, blocks, x[again], y[again], 0.3, indices[again])
    p = torch.zeros(12, 4, dtype=D)
    p[:8] = last.y.detach() if fields.get("error") else last.y.detach().softmax(1)
    error = (one_hot(y, 4) - p)[again]
    if fields.get("one_hot"):
        error = error * one_hot(y, 4)[again]
    delta = 0.3 / 5 * error @ blocks[0][1].head.feedback * (1 - first_batch.y.detach() ** 2)
    weight, bias, *_ = gradients(blocks)
    assert_close([weight, bias], [delta.T @ x[again], delta.sum(0)])
    torch.testing.assert_close(first_batch.metrics[DELAYED_ERROR], error.norm(dim=1).mean())


def test_answers_are_used_from_the_end_of_the_segment(batch: tuple[Tensor, ...]) -> None:
    x, y, indices = batch
    objective = F3()
    blocks = make_net(objective, x, 9)
    (_, first), (_, last) = blocks
    output = train_micro_batch(objective, blocks, x, y, indices=indices)[-1].y.detach()
    assert torch.equal(last.head.answers, torch.zeros(SAMPLES, 4, dtype=D))
    assert torch.equal(last.head.seen.nonzero()[:, 0], indices.sort().values)
    end_segment(objective, blocks)
    answers = last.head.answers.clone()
    assert torch.equal(answers[indices], output.softmax(1))
    assert torch.equal(first.head.answers, answers)
    assert answers.any(1).sum() == 12
    assert not last.head.fresh.any()
    assert not last.head.seen.any()
    end_segment(objective, blocks)
    assert torch.equal(last.head.answers, answers), "samples that were not seen keep their answers"


def test_an_answer_of_zero_is_an_answer(batch: tuple[Tensor, ...]) -> None:
    """Raw outputs may become 0."""
    objective = F3(error="output")
    blocks = make_net(objective, batch[0], 9)
    train_micro_batch(objective, blocks, *batch[:2], indices=batch[2])
    end_segment(objective, blocks)
    with torch.no_grad():
        for parameter in blocks[1][1].trainable_parameters:
            parameter.zero_()
    train_micro_batch(objective, blocks, *batch[:2], indices=batch[2])
    assert blocks[1][1].head.answers.any()
    end_segment(objective, blocks)
    assert not blocks[1][1].head.answers.any()


@pytest.mark.parametrize(("one_hot", "shape"), [(False, (SAMPLES, 4)), (True, (SAMPLES,))])
def test_the_table_is_small_with_the_true_class_alone(
    one_hot: bool, shape: tuple[int, ...]
) -> None:
    (_, first), (_, last) = make_net(F3(one_hot=one_hot), torch.zeros(2, 6, dtype=D), 9)
    shapes = {name: tuple(t.shape) for name, t in {**first.buffers, **last.buffers}.items()}
    assert shapes == {
        "heads.0.feedback": (4, 9),
        "heads.0.answers": shape,
        "heads.1.answers": shape,
        "heads.1.fresh": shape,
        "heads.1.seen": (SAMPLES,),
    }
    assert not any(name.startswith("heads") for name in (*first.parameters, *last.parameters))


def test_one_block_has_no_table() -> None:
    assert F3().make_head(BlockSpec(0, 1, (6,), (4,), D, 4, train_samples=10**12)) is None


def test_large_tables_are_warned_of() -> None:
    """1,281,167 x 1000 numbers of 4 bytes, as of ImageNet."""
    specs = [
        BlockSpec(b, 3, (9,), (1000,), torch.float32, 1000, train_samples=1_281_167)
        for b in range(3)
    ]
    (warning,) = F3().warnings(specs, 32)
    assert numbers_in(warning) >= {"5.1", "3", "1,281,167"}
    assert F3(one_hot=True).warnings(specs, 32) == []
    assert F3(error="output").warnings(specs[-1:], 32) == []


def test_raw_outputs_are_warned_of() -> None:
    specs = [BlockSpec(b, 2, (9,), (4,), D, 4, train_samples=50) for b in range(2)]
    assert len(F3(error="output").warnings(specs, 8)) == 1
    assert F3().warnings(specs, 8) == []
