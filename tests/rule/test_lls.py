"""The objectives `lls`, `lls-m` and `lls-mxm`: their waves, their scores, and who learns."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import DtrainError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.lls import Lls, LlsBase, LlsM, LlsMxM, waves
from dtrain.rng import seeded

D = torch.float64
NAMES = ["lls", "lls-m", "lls-mxm"]
every_one = pytest.mark.parametrize("objective", [Lls(), LlsM(), LlsMxM()], ids=NAMES)


def step(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def task(outputs: tuple[int, ...], classes: int = 4, block: int = 0, blocks: int = 3) -> BlockSpec:
    return BlockSpec(block, blocks, (6,), outputs, D, classes)


def head(objective: LlsBase, where: BlockSpec) -> nn.Module:
    with seeded("lls"):
        made = objective.build_head(where)
    assert made is not None
    return made.to(D)


# The waves


def test_waves_are_sines_of_evenly_spaced_frequencies() -> None:
    t = np.arange(30)
    wanted = np.stack([np.sin(w * t) for w in (50, 50 + 154, 50 + 308, 512)])
    np.testing.assert_allclose(waves("sine", 4, 30).numpy(), wanted, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(waves("square", 4, 30).numpy(), np.sign(wanted))


@pytest.mark.parametrize(("classes", "most"), [(10, 0.004), (100, 0.036)])
def test_waves_are_nearly_orthogonal(classes: int, most: float) -> None:
    """The Gram matrix is about (d/2) I; the correlations are those of 2048 numbers."""
    basis = waves("sine", classes, 2048)
    gram = basis @ basis.T / 1024
    assert (gram.diagonal() - 1).abs().max() < 0.02
    unit = basis / basis.norm(dim=1, keepdim=True)
    assert (unit @ unit.T).fill_diagonal_(0).abs().max().item() == pytest.approx(most, abs=5e-4)
    assert torch.linalg.matrix_rank(basis) == classes


def test_float32_heads_have_the_waves_of_float64() -> None:
    """In float32 the argument of the sine, up to 1e6, would be off by 0.06 rad."""
    basis = head(Lls(), task((2048,), 10)).float().basis
    assert isinstance(basis, Tensor)
    assert torch.equal(basis, waves("sine", 10, 2048).float())


# The scores


@every_one
@pytest.mark.parametrize("basis", ["sine", "square"])
def test_scores_compare_the_normalised_output_with_the_waves(
    objective: LlsBase, basis: Any
) -> None:
    made = head(type(objective)(basis=basis, temperature=0.5), task((9,)))
    h = torch.randn(5, 9, dtype=D)
    wanted = h / h.norm(dim=1, keepdim=True) @ waves(basis, 4, 9).T
    learnt = dict(made.named_parameters())
    if isinstance(objective, LlsM):
        wanted = wanted * learnt.pop("modulation")
    if isinstance(objective, LlsMxM):
        wanted = wanted @ learnt.pop("modulation")
    torch.testing.assert_close(made(h), wanted / 0.5, rtol=1e-13, atol=1e-14)
    assert not learnt


@every_one
def test_the_scale_of_an_output_counts_nothing(objective: LlsBase) -> None:
    made, h = head(objective, task((9,))), torch.randn(5, 9, dtype=D)
    torch.testing.assert_close(made(h), made(1e3 * h), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("objective", "shape"), [(LlsM(), (100,)), (LlsMxM(), (100, 100))])
def test_modulations_start_small(objective: LlsBase, shape: tuple[int, ...]) -> None:
    [learnt] = head(objective, task((9,), 100)).parameters()
    assert learnt.shape == shape
    assert learnt.std().item() == pytest.approx(0.01, rel=0.25)
    assert abs(learnt.mean().item()) < 0.004


@every_one
def test_images_are_averaged_down(objective: LlsBase) -> None:
    made = head(type(objective)(features=40), task((8, 6, 6)))
    x = torch.randn(5, 8, 6, 6, dtype=D)
    same = head(type(objective)(), task((32,)))
    torch.testing.assert_close(made(x), same(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))


# Learning


def test_the_gradient_is_the_closed_form() -> None:
    """dL/dh = (1 - f f^T) S^T (softmax(G) - Y) / (rows |h|), at temperature 1."""
    h = torch.randn(5, 9, dtype=D, requires_grad=True)
    y = torch.randint(0, 4, (5,))
    where = task((9,))
    block = Block(0, {"one": nn.Identity()}, head(Lls(), where), step)
    [(loss, force)] = Lls().backward_pairs(where, block, MicroBatch(h, h, y))
    loss.backward(force)
    size = h.detach().norm(dim=1, keepdim=True)
    f, basis = h.detach() / size, waves("sine", 4, 9)
    pull = ((f @ basis.T).softmax(1) - one_hot(y, 4)) @ basis / 5
    wanted = (pull - f * (f * pull).sum(1, keepdim=True)) / size
    torch.testing.assert_close(h.grad, wanted, rtol=1e-12, atol=1e-15)


@every_one
def test_one_block_is_ordinary_backprop(objective: LlsBase) -> None:
    where = task((4,), block=0, blocks=1)
    assert objective.build_head(where) is None
    x, y, layer = torch.randn(5, 6, dtype=D), torch.randint(0, 4, (5,)), nn.Linear(6, 4).to(D)
    block = Block(0, {"head": layer}, None, step)
    block.backward(objective.backward_pairs(where, block, MicroBatch(x, block.forward(x, ()), y)))
    wanted = torch.autograd.grad(cross_entropy(layer(x), y), layer.weight)
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, wanted[0])


def test_outputs_of_nothing_but_zeros_teach_nothing() -> None:
    """As where all units of a sample are idle: no division by zero."""
    where = task((9,))
    layer = nn.Sequential(nn.Linear(6, 9), nn.ReLU()).to(D)
    nn.init.constant_(layer[0].bias, -100.0)
    block = Block(0, {"one": layer}, head(Lls(), where), step)
    x = torch.randn(5, 6, dtype=D)
    live = MicroBatch(x, block.forward(x, ()), torch.zeros(5, dtype=torch.int64))
    block.backward(Lls().backward_pairs(where, block, live))
    assert live.loss is not None
    assert live.loss.item() == pytest.approx(math.log(4))
    assert all(each.grad is not None and not each.grad.any() for each in layer.parameters())


# What is said


def test_narrow_blocks_are_told_of() -> None:
    tasks = [task((16,), 10, 0), task((61,), 10, 1), task((10,), 10, 2)]
    [told] = Lls().warnings(tasks, 32)
    assert told.startswith("block 0 tells 10 classes apart by waves of 16 numbers")
    assert "correlate by 0.82" in told


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(DtrainError, match=r"temperature = 0\.0"):
        Lls(temperature=0.0)
    with pytest.raises(DtrainError, match="features = 0"):
        LlsM(features=0)


def test_three_names_are_known() -> None:
    assert [OBJECTIVES[name] for name in NAMES] == [Lls, LlsM, LlsMxM]
