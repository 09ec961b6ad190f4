"""Data and models of tasks other than one class label per sample, for tests; all of 67 samples.

Invariant: 50 samples train and 17 test, as in `tests.tiny`, so that batches of 16 divide nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Arrays = tuple[NDArray[np.float64], NDArray[np.generic], NDArray[np.float64], NDArray[np.generic]]

IGNORED = 255
"""Label of the pixels of `segments` that do not count."""


def segments() -> Arrays:
    """Return images (2, 4, 4) with a class of three per pixel; one pixel in three is ignored, and
    all pixels of the first five samples are."""
    random = np.random.default_rng(1)
    y = random.integers(0, 3, (67, 4, 4))
    x = np.stack([y == 1, y == 2], 1) + random.normal(size=(67, 2, 4, 4))
    y[random.random(y.shape) < 1 / 3] = IGNORED
    y[:5] = IGNORED
    return _split(x, y)


def tokens() -> Arrays:
    """Return sequences (6, 5) with a class of three per step."""
    random = np.random.default_rng(2)
    y = random.integers(0, 3, (67, 6))
    return _split(random.normal(size=(3, 5))[y] + random.normal(size=(67, 6, 5)), y)


def numbers() -> Arrays:
    """Return samples (2, 5) with two real numbers each."""
    random = np.random.default_rng(3)
    x = random.normal(size=(67, 2, 5))
    return _split(x, np.stack([x[:, 0, 0] ** 2, x[:, 1, 1] - x[:, 0, 2]], 1))


def pixel_numbers() -> Arrays:
    """Return images (2, 4, 4) with three real numbers per pixel."""
    random = np.random.default_rng(6)
    x = random.normal(size=(67, 2, 4, 4))
    return _split(x, np.stack([x[:, 0], x[:, 0] + x[:, 1], 0 * x[:, 0] + 1], 1))


def flat_numbers() -> Arrays:
    """Return samples (2, 5) with one real number each, without a dimension of its own."""
    x, y, x_test, y_test = numbers()
    return x, y[:, 0], x_test, y_test[:, 0]


def probabilities() -> Arrays:
    """Return samples (2, 5) with the probabilities of three classes."""
    random = np.random.default_rng(4)
    y = random.integers(0, 3, 67)
    x = random.normal(size=(3, 2, 5))[y] * 2 + random.normal(size=(67, 2, 5))
    return _split(x, 0.85 * np.eye(3)[y] + 0.05)


def labels() -> Arrays:
    """Return samples (2, 5) with one class of three each."""
    x, y, x_test, y_test = probabilities()
    return x, y.argmax(1), x_test, y_test.argmax(1)


def regression() -> Arrays:
    """Return 384 training and 128 test samples of 16 numbers with a number (1,) each."""
    random = np.random.default_rng(0)
    x = random.normal(size=(512, 16))
    y = x[:, :1] ** 2 + 0.5 * x[:, 1:2]
    return x[:384], y[:384], x[384:], y[384:]


def yes_or_no() -> Arrays:
    """Return samples (2, 5) with three labels of 0 or 1."""
    x = np.random.default_rng(5).normal(size=(67, 2, 5))
    return _split(x, (x[:, 0, :3] + x[:, 1, :3] > 0).astype(np.int64))


def _split(x: NDArray[np.float64], y: NDArray[np.generic]) -> Arrays:
    return x[:50], y[:50], x[50:], y[50:]


def pixel_net() -> nn.Sequential:
    """Return a net from (2, 4, 4) to scores (3, 4, 4)."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(5, 3, 1),
    )


def gaussian_pixel_net() -> nn.Sequential:
    """Return a net from (2, 4, 4) to means and logarithms of variances (6, 4, 4)."""
    return nn.Sequential(*pixel_net()[:-1], nn.Conv2d(5, 6, 1))


def token_net() -> nn.Sequential:
    """Return a net from (6, 5) to scores (6, 3), the classes last."""
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


class Squeeze(nn.Linear):
    """A linear map to one number, without a dimension of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., 0]


def number_net() -> nn.Sequential:
    """Return a net from (2, 5) to one number ()."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), Squeeze(6, 1)
    )


def column_net() -> nn.Sequential:
    """Return a net from (2, 5) to one number (1,)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1))


def autoencoder() -> nn.Sequential:
    """Return a net from (2, 5) to (2, 5)."""
    layers = nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 10), nn.Unflatten(1, (2, 5))
    return nn.Sequential(nn.Flatten(), *layers)


def quartic(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean fourth power of the error."""
    return (output - target).pow(4).mean()


def largest_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the largest error of a sample, a mean over the rows."""
    return (output - target).abs().flatten(1).amax(1).mean()


def no_number(output: Tensor, target: Tensor) -> Tensor:
    """Return one loss per row, which is no loss of the rows."""
    return (output - target).abs().flatten(1).mean(1)


def constant(output: Tensor, target: Tensor) -> Tensor:
    """Return a number that does not depend on the output."""
    return torch.ones(())
