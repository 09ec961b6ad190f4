"""Augmentation: a sample's draw is its own, uniform, and nobody else's business."""

from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.config import sections as keys
from dtrain.data.augment import AUGMENTS, PAD, CropFlip, build_augment, random_bits
from dtrain.errors import ConfigError, DtrainError

PLACES = 2 * PAD + 1
CELLS = PLACES**2 * 2
X = torch.randn(40, 3, 6, 5, generator=torch.Generator().manual_seed(0))
INDICES = np.random.default_rng(0).permutation(1000)[:40]


def cells(indices: np.ndarray, epoch: int, seed: int = 0) -> np.ndarray:
    """Return which of the 162 outcomes each sample draws."""
    top, left, mirrored = CropFlip(seed).draw(indices, epoch)
    return (top * PLACES + left) * 2 + mirrored


def slowly(x: Tensor, index: int, epoch: int) -> Tensor:
    """Return one sample as the definition has it."""
    (top,), (left,), (mirrored,) = CropFlip(0).draw(np.array([index]), epoch)
    padded = torch.nn.functional.pad(x.flip(-1) if mirrored else x, (PAD,) * 4)
    return padded[:, top : top + x.shape[1], left : left + x.shape[2]]


def surprise(counts: np.ndarray) -> float:
    """Return chi-square against equal counts, in standard deviations above its mean."""
    mean, freedom = counts.mean(), counts.size - 1
    return float((np.square(counts - mean).sum() / mean - freedom) / np.sqrt(2 * freedom))


# What a draw does


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 1, 1), (2, 3, 20)])
def test_it_is_pad_crop_and_flip(shape: tuple[int, ...], kind: torch.dtype) -> None:
    x = torch.randn(40, *shape, generator=torch.Generator().manual_seed(1), dtype=kind)
    before = x.clone()
    got = CropFlip(0)(x, INDICES, 3)
    expected = torch.stack([slowly(*each, 3) for each in zip(x, INDICES, strict=True)])
    assert torch.equal(got, expected)
    assert torch.equal(x, before)
    assert (got.dtype, got.is_contiguous(), got.data_ptr() % 64) == (kind, True, 0)


def test_inputs_that_are_not_contiguous() -> None:
    x = X.transpose(2, 3)
    assert torch.equal(CropFlip(0)(x, INDICES, 0), CropFlip(0)(x.contiguous(), INDICES, 0))


def test_no_samples() -> None:
    assert CropFlip(0)(X[:0], INDICES[:0], 0).shape == (0, 3, 6, 5)


def test_an_image_stays_that_of_its_label() -> None:
    """Each image is filled with its label; something of it always remains, and in its row."""
    labels = torch.arange(1.0, 129.0)
    x = labels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    got = CropFlip(0)(x, np.arange(128), 0)
    assert torch.equal(got.amax((1, 2, 3)), labels)
    assert set(got.unique().tolist()) <= {0.0, *labels.tolist()}


# Whose a draw is


def test_alone_as_in_company() -> None:
    augment = CropFlip(7)
    whole = augment(X, INDICES, 2)
    for some in ([3], [39, 0, 5], list(range(39, -1, -1)), [4, 4]):
        assert torch.equal(augment(X[some], INDICES[some], 2), whole[some])


def test_generators_neither_matter_nor_move() -> None:
    first = CropFlip(0)(X, INDICES, 0)
    torch.manual_seed(5)
    np.random.seed(5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(CropFlip(0)(X, INDICES, 0), first)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_draw_is_the_same_for_ever() -> None:
    """A run that is resumed under another numpy sees the same images."""
    far = np.array([0, 1, 2, 49_999, 2**40])
    assert cells(far, 0).tolist() == [127, 46, 153, 42, 28]
    assert cells(far, 1, seed=2**62).tolist() == [70, 43, 35, 59, 20]


def test_noise_is_splitmix64() -> None:
    """The first numbers of seed 1234567, as published with several implementations."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert random_bits(np.arange(3), 1234567).tolist() == expected


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (1, 1)])
def test_epochs_and_seeds_differ(other: tuple[int, int]) -> None:
    many = np.arange(16_200)
    same = np.count_nonzero(cells(many, 0, 0) == cells(many, *other))
    assert abs(same - 100) < 50  # 5 standard deviations
    assert not torch.equal(CropFlip(0)(X, INDICES, 0), CropFlip(other[1])(X, INDICES, other[0]))


# How it is spread


@pytest.mark.parametrize("epoch", [0, 1, 299])
def test_all_outcomes_are_equally_likely_over_samples(epoch: int) -> None:
    counts = np.bincount(cells(np.arange(32_400), epoch), minlength=CELLS)
    assert (counts.size, abs(surprise(counts)) < 5) == (CELLS, True)


def test_all_outcomes_are_equally_likely_over_epochs() -> None:
    drawn = np.concatenate([cells(np.array([0, 77]), epoch) for epoch in range(1620)])
    assert abs(surprise(np.bincount(drawn, minlength=CELLS))) < 5


@pytest.mark.parametrize("step", [1, 2, 128, 2**32])
def test_neighbours_are_independent(step: int) -> None:
    many = np.arange(20_000)
    for part in range(3):
        first, second = (CropFlip(0).draw(each, 0)[part] for each in (many, many + step))
        pairs = np.bincount(first * PLACES + second, minlength=PLACES**2).reshape(PLACES, -1)
        assert abs(surprise(pairs[:2, :2] if part == 2 else pairs)) < 5


def test_row_column_and_mirror_are_independent_of_the_epoch_before() -> None:
    many = np.arange(CELLS * 200)
    half = cells(many, 0) // 18 * 9 + cells(many, 1) // 18
    assert abs(surprise(np.bincount(half, minlength=PLACES**2))) < 5


# What is refused


@pytest.mark.parametrize("shape", [(64,), (3, 32), (1, 4, 8, 8)])
def test_only_images(shape: tuple[int, ...]) -> None:
    CropFlip(0).check_shape((1, 8, 8))
    with pytest.raises(DtrainError, match="augment") as caught:
        CropFlip(0).check_shape(shape)
    assert caught.value.code == ConfigError.code
    assert str(shape) in caught.value.message


def test_names() -> None:
    assert build_augment("none", 0) is None
    made = build_augment("crop-flip", 3)
    assert isinstance(made, CropFlip)
    assert made.seed == 3
    with pytest.raises(DtrainError, match="did you mean 'crop-flip'"):
        build_augment("crop-flop", 0)
    assert set(get_args(get_type_hints(keys.DataSection)["augment"])) == set(AUGMENTS)
