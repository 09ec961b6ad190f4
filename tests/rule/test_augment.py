"""Augmentation: a sample's random change is uniform and depends only on seed, epoch and index."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.config.sections import AUGMENTS as NAMES
from dtrain.data.array_source import MemorySource
from dtrain.data.augment import AUGMENTS, PAD, CropFlip, UserAugment, build_augment, random_bits
from dtrain.data.dataset import Subset
from dtrain.data.loader import Loader
from dtrain.data.source_dataset import SourceDataset
from dtrain.errors import ConfigError, DataError
from dtrain.rng import generator_states
from tests import tiny
from tests.refusals import refuses

OFFSETS = 2 * PAD + 1
OUTCOMES = OFFSETS**2 * 2
X = torch.randn(40, 3, 6, 5, generator=torch.Generator().manual_seed(0))
INDICES = np.random.default_rng(0).permutation(1000)[:40]


def outcomes(indices: np.ndarray, epoch: int, seed: int = 0) -> np.ndarray:
    """Return the number of each sample's outcome, 0 ... 161."""
    top, left, mirrored = CropFlip(seed).draw(indices, epoch)
    return (top * OFFSETS + left) * 2 + mirrored


def reference(x: Tensor, index: int, epoch: int) -> Tensor:
    """Return one augmented sample, by torch's own pad."""
    (top,), (left,), (mirrored,) = CropFlip(0).draw(np.array([index]), epoch)
    padded = torch.nn.functional.pad(x.flip(-1) if mirrored else x, (PAD,) * 4)
    return padded[:, top : top + x.shape[1], left : left + x.shape[2]]


def chi_square(counts: np.ndarray) -> float:
    """Return chi-square against equal counts, in standard deviations above its mean."""
    mean, freedom = counts.mean(), counts.size - 1
    return float((np.square(counts - mean).sum() / mean - freedom) / np.sqrt(2 * freedom))


# Effect


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 1, 1), (2, 3, 20)])
def test_it_is_pad_crop_and_flip(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(40, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    before = x.clone()
    augmented = CropFlip(0)(x, INDICES, 3)
    expected = torch.stack([reference(*sample, 3) for sample in zip(x, INDICES, strict=True)])
    assert torch.equal(augmented, expected)
    assert torch.equal(x, before)
    layout = augmented.dtype, augmented.is_contiguous(), augmented.data_ptr() % 64
    assert layout == (dtype, True, 0)


def test_inputs_that_are_not_contiguous() -> None:
    x = X.transpose(2, 3)
    assert torch.equal(CropFlip(0)(x, INDICES, 0), CropFlip(0)(x.contiguous(), INDICES, 0))


def test_no_samples() -> None:
    assert CropFlip(0)(X[:0], INDICES[:0], 0).shape == (0, 3, 6, 5)


def test_an_image_stays_that_of_its_label() -> None:
    """Each image is filled with its label; a part of it always remains, and in its row."""
    labels = torch.arange(1.0, 129.0)
    x = labels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    augmented = CropFlip(0)(x, np.arange(128), 0)
    assert torch.equal(augmented.amax((1, 2, 3)), labels)
    assert set(augmented.unique().tolist()) <= {0.0, *labels.tolist()}


# Dependence


def test_a_sample_does_not_depend_on_its_batch() -> None:
    augment = CropFlip(7)
    batch = augment(X, INDICES, 2)
    for rows in ([3], [39, 0, 5], list(range(39, -1, -1)), [4, 4]):
        assert torch.equal(augment(X[rows], INDICES[rows], 2), batch[rows])


def test_generators_are_neither_used_nor_changed() -> None:
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
    assert outcomes(far, 0).tolist() == [127, 46, 153, 42, 28]
    assert outcomes(far, 1, seed=2**62).tolist() == [70, 43, 35, 59, 20]


def test_random_bits_are_splitmix64() -> None:
    """The first numbers of seed 1234567, as published with several implementations."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert random_bits(np.arange(3), 1234567).tolist() == expected


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (1, 1)])
def test_epochs_and_seeds_differ(other: tuple[int, int]) -> None:
    many = np.arange(16_200)
    same = np.count_nonzero(outcomes(many, 0, 0) == outcomes(many, *other))
    assert abs(same - 100) < 50  # 5 standard deviations
    assert not torch.equal(CropFlip(0)(X, INDICES, 0), CropFlip(other[1])(X, INDICES, other[0]))


# Distribution


@pytest.mark.parametrize("epoch", [0, 1, 299])
def test_all_outcomes_are_equally_likely_over_samples(epoch: int) -> None:
    counts = np.bincount(outcomes(np.arange(32_400), epoch), minlength=OUTCOMES)
    assert (counts.size, abs(chi_square(counts)) < 5) == (OUTCOMES, True)


def test_all_outcomes_are_equally_likely_over_epochs() -> None:
    drawn = np.concatenate([outcomes(np.array([0, 77]), epoch) for epoch in range(1620)])
    assert abs(chi_square(np.bincount(drawn, minlength=OUTCOMES))) < 5


@pytest.mark.parametrize("step", [1, 2, 128, 2**32])
def test_neighbours_are_independent(step: int) -> None:
    many = np.arange(20_000)
    draws = zip(CropFlip(0).draw(many, 0), CropFlip(0).draw(many + step, 0), strict=True)
    for (first, second), values in zip(draws, (OFFSETS, OFFSETS, 2), strict=True):
        pairs = np.bincount(first * values + second, minlength=values**2)
        assert abs(chi_square(pairs)) < 5


def test_row_column_and_mirror_are_independent_of_the_epoch_before() -> None:
    many = np.arange(OUTCOMES * 200)
    half = outcomes(many, 0) // 18 * 9 + outcomes(many, 1) // 18
    assert abs(chi_square(np.bincount(half, minlength=OFFSETS**2))) < 5


# Refusals


@pytest.mark.parametrize("shape", [(64,), (3, 32), (1, 4, 8, 8)])
def test_only_images(shape: tuple[int, ...]) -> None:
    CropFlip(0).check_shape((1, 8, 8))
    with refuses(ConfigError, "data.augment-needs-images"):
        CropFlip(0).check_shape(shape)


def test_names() -> None:
    assert build_augment("none", 0) is None
    augment = build_augment("crop-flip", 3)
    assert isinstance(augment, CropFlip)
    assert augment.seed == 3
    with refuses(ConfigError, "augment.unknown"):
        build_augment("crop-flop", 0)
    assert set(NAMES) == set(AUGMENTS)


# A user's function


def noise(sample: Tensor, index: int, epoch: int, generator: torch.Generator) -> Tensor:
    sample += index  # a copy of its own
    return sample + epoch + torch.rand(sample.shape, generator=generator, dtype=sample.dtype)


STREAM = np.random.default_rng(0)


def global_torch(sample: Tensor, index: int, epoch: int, generator: torch.Generator) -> Tensor:
    return sample + torch.rand(())


def global_numpy(sample: Tensor, index: int, epoch: int, generator: torch.Generator) -> Tensor:
    return sample if np.random.rand() < 0.5 else sample + 1


def global_python(sample: Tensor, index: int, epoch: int, generator: torch.Generator) -> Tensor:
    return sample + random.random()


def own_stream(sample: Tensor, index: int, epoch: int, generator: torch.Generator) -> Tensor:
    return sample + STREAM.normal()


def user_augment(function: Any, seed: int = 0) -> UserAugment:
    augment = build_augment(function, seed)
    assert isinstance(augment, UserAugment)
    return augment


def test_a_function_s_numbers_depend_on_seed_epoch_and_index_alone() -> None:
    augment, before = user_augment(noise), X.clone()
    result = augment(X, INDICES, 3)
    assert torch.equal(X, before)
    order = np.arange(40)[::-1].copy()
    assert torch.equal(user_augment(noise)(X[order], INDICES[order], 3), result[order])
    assert torch.equal(augment(X[5:6], INDICES[5:6], 3), result[5:6])
    drawn = result - X - torch.from_numpy(INDICES).view(-1, 1, 1, 1) - 3
    assert -1e-3 < float(drawn.min()) < float(drawn.max()) < 1 + 1e-3
    assert drawn.std() > 0.2
    for other in (user_augment(noise, 1)(X, INDICES, 3), augment(X, INDICES, 4) - 1):
        assert (other - result).abs().mean() > 0.2


def test_the_index_is_that_before_samples_are_held_out() -> None:
    seen = []

    def note(sample: Tensor, index: int, epoch: int, generator: torch.Generator) -> Tensor:
        seen.append(index)
        return sample

    images = SourceDataset(MemorySource(X.numpy()), MemorySource(np.zeros(len(X), np.int64)), 2)
    part = Subset(images, np.array([20, 0, 10]))
    loader = Loader(part, torch.float32, build_augment(note, 0))
    loader.open([np.array([2, 0, 1])], 0)
    loader.read()
    loader.close()
    assert seen == [10, 20, 0]


def test_a_function_that_a_module_has_is_sent_to_other_processes_by_its_name() -> None:
    for function in (noise, f"{__name__}:noise"):
        augment = user_augment(function)
        expected = augment(X, INDICES, 0)
        text = pickle.dumps(augment)
        assert torch.equal(pickle.loads(text)(X, INDICES, 0), expected)
        assert len(text) < 1000


@pytest.mark.parametrize(
    "function",
    [
        lambda sample, *_: sample.numpy(),
        lambda sample, *_: sample.double(),
        lambda sample, *_: sample[:, :-1],
        lambda sample, *_: None,
    ],
)
def test_results_of_another_kind_are_refused(function: Any) -> None:
    with refuses(DataError, "data.augment-result"):
        user_augment(function)(X, INDICES, 0)


@pytest.mark.parametrize("function", [global_torch, global_numpy, global_python, own_stream])
def test_other_generators_are_refused(function: Any) -> None:
    with refuses(ConfigError, "data.augment-not-repeatable"):
        user_augment(function).check_repeatable(X, INDICES)


def test_the_check_leaves_the_global_generators_as_they_were() -> None:
    states = generator_states()
    user_augment(noise).check_repeatable(X, INDICES)
    assert generator_states() == states


def test_the_name_of_a_function_is_in_the_run() -> None:
    run = tiny.run(data__augment=noise)
    text = run.to_table()["data"]["augment"]
    assert text == f"{__name__}:noise"
    inner = tiny.run(data__augment=lambda sample, *_: sample)
    assert (
        tiny.run(data__augment=inner.to_table()["data"]["augment"]).to_table() == inner.to_table()
    )
    with refuses(ConfigError, "augment.unknown"):
        tiny.run(data__augment="crop-flop")
