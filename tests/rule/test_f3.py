"""The objective `f3`: errors that are an epoch old, and the table that they come from."""

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
from dtrain.objectives.f3 import F3, METRIC
from dtrain.rng import seeded
from tests.rule.walked import SAMPLES, D, learnt, made

Blocks = list[tuple[BlockSpec, Block]]
every_kind = pytest.mark.parametrize(
    "told", [{}, {"error": "output"}, {"one_hot": True}, {"error": "output", "one_hot": True}]
)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return data, labels, and which of 30 samples they are."""
    with seeded("batch"):
        x, y = torch.randn(12, 6, dtype=D), torch.randint(0, 4, (12,))
        return x, y, torch.randperm(SAMPLES)[:12]


def deep(objective: Objective, x: Tensor, *sizes: int) -> Blocks:
    """Return the blocks of a net with tanh; as many as sizes, and one."""
    with seeded("net"):
        layers = [nn.Linear(*size).to(D) for size in zip((6, *sizes), (*sizes, 4), strict=True)]
    parts = [[layer, nn.Tanh()] for layer in layers[:-1]]
    return made(objective, [*parts, layers[-1:]], x, 4)


def turn(objective: Objective, blocks: Blocks) -> None:
    """End a segment on one rank."""
    for task, block in blocks:
        objective.solve(task, block)
    for _, block in blocks:
        block.head.answers.copy_(blocks[-1][1].head.answers)


def gradients(blocks: Blocks) -> list[Tensor]:
    """Return the gradients of one learning, and forget them."""
    found = [g.clone() for _, block in blocks for g in block.gradients()]
    for _, block in blocks:
        for parameter in block.trainable_parameters:
            parameter.grad = None
    return found


def close(one: list[Tensor], other: list[Tensor]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-16)


@every_kind
def test_the_first_epoch_is_drtp(told: dict[str, Any], batch: tuple[Tensor, ...]) -> None:
    x, y, which = batch
    blocks, others = deep(F3(**told), x, 9, 7), deep(Drtp(), x, 9, 7)
    lives = learnt(F3(**told), blocks, x, y, indices=which)
    learnt(Drtp(), others, x, y, indices=which)
    close(gradients(blocks), gradients(others))
    assert [float(live.metrics[METRIC]) for live in lives[:-1]] == [1, 1]


def test_with_weights_that_stand_still_it_is_dfa_with_the_negative_matrix(
    batch: tuple[Tensor, ...],
) -> None:
    """Onehot - softmax is the negative of DFA's error."""
    x, y, which = batch
    objective, direct = F3(), Dfa(normalised=False)
    blocks, others = deep(objective, x, 9, 7), deep(direct, x, 9, 7)
    for (_, block), (_, other) in zip(blocks[:-1], others[:-1], strict=True):
        other.head.feedback.copy_(-block.head.feedback)
    learnt(objective, blocks, x, y, indices=which)
    first = gradients(blocks)
    turn(objective, blocks)
    learnt(objective, blocks, x, y, share=0.5, indices=which)
    learnt(direct, others, x, y, share=0.5)
    second = gradients(blocks)
    close(second, gradients(others))
    assert not torch.allclose(first[0] / 2, second[0], rtol=0.1)


@every_kind
def test_the_force_is_the_error_of_the_epoch_before(
    told: dict[str, Any], batch: tuple[Tensor, ...]
) -> None:
    """Written out, for samples of which the net has seen some, in another order."""
    x, y, which = batch
    objective = F3(**told)
    blocks = deep(objective, x, 9)
    last = learnt(objective, blocks, x[:8], y[:8], indices=which[:8])[-1]
    gradients(blocks)
    turn(objective, blocks)
    with torch.no_grad():
        blocks[1][1].layers["l10"].weight.mul_(2)
    again = torch.tensor([11, 3, 0, 9, 7])
    first, _ = learnt(objective, blocks, x[again], y[again], 0.3, which[again])
    p = torch.zeros(12, 4, dtype=D)
    p[:8] = last.y.detach() if told.get("error") else last.y.detach().softmax(1)
    error = (one_hot(y, 4) - p)[again]
    if told.get("one_hot"):
        error = error * one_hot(y, 4)[again]
    delta = 0.3 / 5 * error @ blocks[0][1].head.feedback * (1 - first.y.detach() ** 2)
    weight, bias, *_ = gradients(blocks)
    close([weight, bias], [delta.T @ x[again], delta.sum(0)])
    torch.testing.assert_close(first.metrics[METRIC], error.norm(dim=1).mean())


def test_answers_are_used_at_the_segments_end_and_not_before(batch: tuple[Tensor, ...]) -> None:
    x, y, which = batch
    objective = F3()
    blocks = deep(objective, x, 9)
    (_, lower), (_, upper) = blocks
    last = learnt(objective, blocks, x, y, indices=which)[-1]
    assert torch.equal(upper.head.answers, torch.zeros(SAMPLES, 4, dtype=D))
    assert torch.equal(upper.head.seen.nonzero()[:, 0], which.sort().values)
    turn(objective, blocks)
    held = upper.head.answers.clone()
    assert torch.equal(held[which], last.y.detach().softmax(1))
    assert torch.equal(lower.head.answers, held)
    assert held.any(1).sum() == 12
    assert not upper.head.fresh.any()
    assert not upper.head.seen.any()
    turn(objective, blocks)
    assert torch.equal(upper.head.answers, held), "who was not seen keeps his answer"


def test_an_answer_of_zero_is_an_answer(batch: tuple[Tensor, ...]) -> None:
    """Raw outputs may be 0 where something else was known before."""
    objective = F3(error="output")
    blocks = deep(objective, batch[0], 9)
    learnt(objective, blocks, *batch[:2], indices=batch[2])
    turn(objective, blocks)
    with torch.no_grad():
        for parameter in blocks[1][1].trainable_parameters:
            parameter.zero_()
    learnt(objective, blocks, *batch[:2], indices=batch[2])
    assert blocks[1][1].head.answers.any()
    turn(objective, blocks)
    assert not blocks[1][1].head.answers.any()


@pytest.mark.parametrize(("one", "wide"), [(False, (SAMPLES, 4)), (True, (SAMPLES,))])
def test_the_table_is_small_with_the_true_class_alone(one: bool, wide: tuple[int, ...]) -> None:
    (_, lower), (_, upper) = deep(F3(one_hot=one), torch.zeros(2, 6, dtype=D), 9)
    shapes = {name: tuple(t.shape) for name, t in {**lower.buffers, **upper.buffers}.items()}
    assert shapes == {
        "heads.0.feedback": (4, 9),
        "heads.0.answers": wide,
        "heads.1.answers": wide,
        "heads.1.fresh": wide,
        "heads.1.seen": (SAMPLES,),
    }
    assert not any(name.startswith("heads") for name in (*lower.parameters, *upper.parameters))


def test_one_block_has_no_table() -> None:
    assert F3().build_head(BlockSpec(0, 1, (6,), (4,), D, 4, train_samples=10**12)) is None


def test_large_tables_are_told() -> None:
    """1,281,167 x 1000 numbers of 4 bytes, as of ImageNet."""
    tasks = [
        BlockSpec(b, 3, (9,), (1000,), torch.float32, 1000, train_samples=1_281_167)
        for b in range(3)
    ]
    (told,) = F3().warnings(tasks, 32)
    assert "5.1 GB in each of 3 blocks" in told
    assert "one-hot = true keeps 1,281,167 numbers" in told
    assert F3(one_hot=True).warnings(tasks, 32) == []
    assert F3(error="output").warnings(tasks[-1:], 32) == []


def test_raw_outputs_are_told() -> None:
    tasks = [BlockSpec(b, 2, (9,), (4,), D, 4, train_samples=50) for b in range(2)]
    assert ['error = "softmax"' in told for told in F3(error="output").warnings(tasks, 8)] == [True]
    assert F3().warnings(tasks, 8) == []
