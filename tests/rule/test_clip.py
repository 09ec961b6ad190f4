"""Clipping against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dtrain.block.optimizer import clip_by_norm_, squared_norm

SHAPES = [(7, 5), (), (3, 2, 2), (0,), (11,)]


def gradients(dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of several shapes, one of them a transposed view."""
    source = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in SHAPES]
    return [found[0].to(dtype).T, *(each.to(dtype) for each in found[1:])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [0.5, 3.0, 100.0])
def test_a_clip_is_torchs(dtype: torch.dtype, most: float) -> None:
    parameters = [nn.Parameter(torch.zeros_like(each)) for each in gradients(dtype)]
    for parameter, gradient in zip(parameters, gradients(dtype), strict=True):
        parameter.grad = gradient.clone()
    wanted_norm = float(nn.utils.clip_grad_norm_(parameters, most))
    found = gradients(dtype)
    norm = math.sqrt(squared_norm(found))
    rounding = torch.finfo(dtype).eps
    assert norm == pytest.approx(wanted_norm, rel=4 * rounding)
    clip_by_norm_(found, norm, most)
    for parameter, gradient in zip(parameters, found, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=8 * rounding, atol=0)
    clipped = math.sqrt(squared_norm(found))
    assert clipped == pytest.approx(min(most, norm), rel=max(1e-5, 4 * rounding))


def test_squares_are_summed_in_float64() -> None:
    """In float32 two thousand ones would vanish beside 1e8."""
    found = squared_norm([torch.tensor([1e4]), torch.full((2000,), 1.0)])
    assert found == pytest.approx(1e8 + 2000, rel=1e-14)
    mixed = torch.ones(2001)
    mixed[0] = 1e4
    assert squared_norm([mixed]) == pytest.approx(1e8 + 2000, rel=1e-14)
    assert squared_norm([]) == 0.0


def test_blocks_add_up_to_the_model() -> None:
    found = gradients(torch.float64)
    assert squared_norm(found[:2]) + squared_norm(found[2:]) == pytest.approx(
        squared_norm(found), rel=1e-15
    )


def test_small_gradients_are_untouched_bit_for_bit() -> None:
    found = gradients(torch.float32)
    kept = [each.clone() for each in found]
    clip_by_norm_(found, math.sqrt(squared_norm(found)), 1000.0)
    zeros = [torch.zeros(3)]
    clip_by_norm_(zeros, 0.0, 1.0)
    assert all(map(torch.equal, found, kept))
    assert torch.equal(zeros[0], torch.zeros(3))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients(wrong: float) -> None:
    found = [torch.tensor([1.0, 2.0]), torch.tensor([wrong])]
    norm = math.sqrt(squared_norm(found))
    assert not math.isfinite(norm)
    clip_by_norm_(found, norm, 0.1)
    assert found[0].tolist() == [1.0, 2.0]
