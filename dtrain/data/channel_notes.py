"""Notes on the axis of the channels: samples that seem to have them last, and constant channels.

The rules, for samples with channels first:

=============  =====================================================================================
shape          noted where
=============  =====================================================================================
(H, W, C)      C is 1, 3 or 4, H and W are at least 8 and 4 C, and H / W is between 1/4 and 4
(D, H, W, C)   C is 1, 3 or 4, and each other axis is at least 8 and 4 C
(T, features)  T is at least 8 and larger than the features; statistics differ strongly between the
               features, and 5 times less between the steps
=============  =====================================================================================

So (1, 8, 8), (3, 32, 32), (64, 8, 4), (28, 28) and a spectrogram (mels, frames) have no note, but
one of (frames, mels) has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dtrain.data.dataset import Dataset
from dtrain.data.statistics import TrainingStatistics

IMAGE_CHANNELS = (1, 3, 4)


MIN_SIDE, SIDES_PER_CHANNEL, MAX_ASPECT = 8, 4, 4


PROBE_SAMPLES, PROBE_NUMBERS = 64, 2**20
"""Samples, and numbers, from which differences between steps and between features are estimated."""


STRONG_DIFFERENCE, DIFFERENCE_RATIO = 8.0, 5.0


NAMED_CHANNELS = 5


def channel_notes(training: TrainingStatistics) -> Iterator[str]:
    """Yield notes on the axis of the channels and on constant channels."""
    dataset, shape = training.dataset, training.dataset.shape
    if training.axis == 0 and (_looks_like_image(shape) or _looks_like_series(dataset)):
        kind = "series (steps, features)" if len(shape) == 2 else "images with channels last"
        yield (
            f"samples of shape {shape} look like {kind}, but are standardised along their first "
            f'axis, {shape[0]} channels: set [data] channels = "last" for one mean and deviation '
            f"per index of the last axis ({shape[-1]})"
        )
    constant = training.constant_channels()
    if constant:
        yield _constant_note(constant, shape[training.axis])


def _constant_note(constant: list[int], channels: int) -> str:
    """Return the note that names constant channels."""
    names = ", ".join(map(str, constant[:NAMED_CHANNELS]))
    if len(constant) > NAMED_CHANNELS:
        names += f", ... ({len(constant)})"
    subject = "channel" if len(constant) == 1 else "channels"
    verb = "is" if len(constant) == 1 else "are"
    return (
        f"{subject} {names} of {channels} {verb} constant in the training split, and left at scale "
        "1: leave a constant channel out, or check how the data were made"
    )


def _looks_like_image(shape: tuple[int, ...]) -> bool:
    """Return whether samples look like images or volumes with their channels last."""
    *sides, channels = shape
    if len(sides) not in (2, 3) or channels not in IMAGE_CHANNELS:
        return False
    if min(sides) < max(MIN_SIDE, SIDES_PER_CHANNEL * channels):
        return False
    return len(sides) == 3 or max(sides) <= MAX_ASPECT * min(sides)


def _looks_like_series(dataset: Dataset) -> bool:
    """Return whether samples look like series of steps with features; some samples are read."""
    if len(dataset.shape) != 2:
        return False
    length, width = dataset.shape
    if width < 2 or length <= max(width, MIN_SIDE - 1):
        return False
    count = min(PROBE_SAMPLES, max(1, PROBE_NUMBERS // math.prod(dataset.shape)), dataset.size)
    indices = np.unique(np.linspace(0, dataset.size - 1, count).astype(np.int64))
    samples = dataset.inputs(indices)
    rows = (samples.abs() if samples.is_complex() else samples).double().numpy()
    steps, features = _difference(rows.swapaxes(0, 1)), _difference(rows.swapaxes(0, 2))
    return features >= STRONG_DIFFERENCE and features >= DIFFERENCE_RATIO * steps


def _difference(channels: NDArray[np.float64]) -> float:
    """Return how much mean and deviation differ between the indices of the first axis.

    It is the larger of two numbers: the largest deviation over the smallest one, and 1 plus the
    range of the means over the median deviation. Equal channels give 1; constant ones do not count.
    """
    flat = channels.reshape(len(channels), -1)
    mean, deviation = flat.mean(axis=1), flat.std(axis=1)
    varying = deviation[deviation > 1e-12 * np.abs(flat).max()]
    if not len(varying):
        return 1.0
    spread = (mean.max() - mean.min()) / np.median(varying)
    return float(max(varying.max() / varying.min(), 1 + spread))
