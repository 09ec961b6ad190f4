"""The inlet of a block that denoises labels: from sample, noisy code and noise level to features.

::

    x --> stem --> fit --> normalise --*(1 + scale)--+ shift--> features that the block takes
                                             ^            ^
    noisy code, noise level --> perceptron --'------------'

`stem` is a copy of the model's first layer. `fit` is a linear layer or a 1x1 convolution where the
stem's output has not the shape that the block takes. Normalisation, scale and shift are AdaLN
(Peebles and Xie 2023, arXiv 2212.09748).

Invariant: the code of a position changes the features of that position alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

LEVEL_FEATURES = 3
"""Numbers by which the inlet reads a noise level."""


MAX_HIDDEN = 128
"""Largest hidden width of an inlet's perceptron."""


@final
class Inlet(nn.Module):
    """The first layer of a block: reads a sample, its noisy code and the noise level.

    Parameters
    ----------
    make_stem : callable
        Makes the stem, from samples (rows, *sample_shape) to features (rows, *stem_shape).
    integers : bool
        Whether samples are integers; they pass through a row of real numbers.
    code_shape, shape : tuple of int
        Of a sample: its noisy code (*P, d), and the features that the block takes.
    level_features : int
        Numbers of the noise level.
    """

    def __init__(
        self,
        make_stem: Callable[[], nn.Module],
        stem_shape: tuple[int, ...],
        sample_shape: tuple[int, ...],
        integers: bool,
        code_shape: tuple[int, ...],
        shape: tuple[int, ...],
        level_features: int,
    ) -> None:
        super().__init__()
        self.stem, self.fit = make_stem(), fit_shape(stem_shape, shape)
        self.sample_shape, self.code_shape, self.shape = sample_shape, code_shape, shape
        self.integers = integers
        self.channels_first = len(shape) > 2
        features = shape[0] if self.channels_first else shape[-1]
        hidden = min(features, MAX_HIDDEN)
        self.condition = nn.Sequential(
            nn.Linear(code_shape[-1] + level_features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * features),
        )
        self.uses_rng = False  # of this module; those of the stem say it themselves

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its inputs."""
        return next(self.condition.parameters()).dtype

    def forward(self, input: Tensor) -> Tensor:
        """Return features (rows, *shape) of inputs (rows, numbers)."""
        rows, numbers, codes = len(input), math.prod(self.sample_shape), math.prod(self.code_shape)
        x = input[:, :numbers].reshape(rows, *self.sample_shape)
        h: Tensor = self.stem(x.round().long() if self.integers else x)
        if self.fit is not None:
            h = self.fit(h)
        normalised = layer_norm(h, self.shape if self.channels_first else self.shape[-1:])
        code = input[:, numbers : numbers + codes].reshape(rows, *self.code_shape)
        level = input[:, numbers + codes :]
        positions = self.code_shape[:-1]
        level = level.view(rows, *(1 for _ in positions), -1).expand(rows, *positions, -1)
        factors: Tensor = self.condition(torch.cat([code, level], -1))
        factors = self._spread(factors)
        scale, shift = factors.chunk(2, 1 if self.channels_first else -1)
        return normalised * (1 + scale) + shift

    def _spread(self, factors: Tensor) -> Tensor:
        """Return factors (rows, *P, 2 features) with the dimensions of the features."""
        missing = len(self.shape) + 1 - factors.dim()
        rows, numbers = factors.shape[0], factors.shape[-1]
        if missing and self.channels_first:
            return factors.view(rows, numbers, *(1 for _ in range(missing)))
        if missing:
            return factors.view(rows, *(1 for _ in range(missing)), numbers)
        return factors.movedim(-1, 1) if self.channels_first else factors


def can_fit(stem: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether `fit_shape` has a module between two shapes."""
    are_images = len(stem) == len(shape) == 3
    have_positions = len(stem) == len(shape) == 2 and stem[0] == shape[0]
    return stem == shape or len(shape) == 1 or are_images or have_positions


def fit_shape(stem: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module | None:
    """Return a module from a stem's output to the shape that a block takes; None where both agree.

    ::

        (anything)  -> (w,)          linear
        (L, w)      -> (L, v)        linear per position
        (c, *P)     -> (k, *Q)       convolution 1x1, mean to Q pixels      images
    """
    if stem == shape:
        return None
    if len(shape) == 1:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(stem), *shape))
    if len(shape) == 2:
        return nn.Linear(stem[1], shape[1])
    resize = nn.AdaptiveAvgPool2d((shape[1], shape[2]))
    return nn.Sequential(nn.Conv2d(stem[0], shape[0], 1), resize)


def embed_levels(levels: Tensor) -> Tensor:
    """Return noise levels (rows,) with a slow sine and cosine, (rows, LEVEL_FEATURES).

    Predictions start at levels that are hardly ever drawn in training, to which faster waves would
    not extrapolate.
    """
    angles = math.pi / 2 * levels
    return torch.stack([levels, angles.sin(), angles.cos()], 1)


def positions_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the positions of features: (c, *P) with more than two dimensions, else (*P, w)."""
    return shape[1:] if len(shape) > 2 else shape[:-1]
