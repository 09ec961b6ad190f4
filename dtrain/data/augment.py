r"""Augmentation: random changes of training samples as they are read.

Invariant: a sample's random numbers depend only on (seed, epoch, index), never on batch, order,
layout, thread, the state of a generator or the installed numpy. Labels never change.

All changes come after standardisation: zeros are the mean of the training split, and a function of
a user sees what the model would see. With `normalise = false` it sees bytes as 0 ... 1.

::

    sample 8x8       mirrored or not       padded to 16x16, cropped to 8x8
    +--------+         +--------+          0 0 0 0 0 0 0 0
    |  /|    |         |    |\  |          0 0+--------+
    |   |    |   ->    |    |   |   ->     0 0|    |\  |       first row and column 0 ... 8,
    |   |    |         |    |   |          0 0|    |   |       all equally likely
    +--------+         +--------+          0 0|    |   |
                                           0 0+--------+
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from dtrain.data.sampler import Indices
from dtrain.errors import ConfigError, DataError, unknown_name
from dtrain.rng import derive_seed, fixed_random_numbers
from dtrain.user_code import PATTERN, find_value, value_text

PAD = 4
"""Pixels of zero on each side of an image before it is cropped."""


SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15


SPLITMIX_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shift and factor of each round of SplitMix64."""


class Augment(ABC):
    """A random change of training samples as they are read.

    Parameters
    ----------
    seed : int
        The run's seed.

    Attributes
    ----------
    by_source_index : bool
        Whether it takes the indices in the data as they are given, before samples are held out for
        validation; otherwise those in the training split.
    """

    by_source_index: bool = False

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse samples of a shape that cannot be augmented in this way.

        Raises
        ------
        ConfigError
            The shape is unsuitable.
        """

    @abstractmethod
    def __call__(self, x: Tensor, indices: Indices, epoch: int) -> Tensor:
        """Return augmented copies of samples, of the same shape and dtype; `x` is not written to.

        Parameters
        ----------
        x : Tensor
            Samples, (n, *shape).
        indices : array
            The samples' indices in the training split, (n,).
        epoch : int
            From 0.
        """


@final
class CropFlip(Augment):
    """Mirror one image in two, pad with 4 zeros on each side, crop at random to the old size.

    He et al., "Deep residual learning for image recognition", arXiv 1512.03385, section 4.2. The
    zeros are added after standardisation, so the border has the training split's mean colour;
    without standardisation it is black.
    """

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise ConfigError(
                "data.augment-needs-images",
                f'[data] augment = "crop-flip" needs images (channels, height, width), but the '
                f'samples have shape {shape}: set augment = "none"',
            )

    def __call__(self, x: Tensor, indices: Indices, epoch: int) -> Tensor:
        n, channels, height, width = x.shape
        top, left, mirrored = self.draw(indices, epoch)
        # In numpy, since torch would start more threads inside the loader's thread.
        images, result = x.numpy(), torch.empty_like(x, memory_format=torch.contiguous_format)
        padded = np.zeros((n, channels, height + 2 * PAD, width + 2 * PAD), images.dtype)
        middle = padded[:, :, PAD : PAD + height, PAD : PAD + width]
        middle[...] = images
        middle[mirrored] = images[mirrored, ..., ::-1]
        windows = sliding_window_view(padded, (height, width), (2, 3))
        result.numpy()[...] = windows[np.arange(n), :, top, left]
        return result

    def draw(
        self, indices: Indices, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Draw each crop's first row and column, 0 ... 2 * PAD, and whether it is mirrored."""
        bits = random_bits(indices, derive_seed("augment", self.seed, epoch))
        offsets = 2 * PAD + 1
        # The upper half of the product is uniform to 2e-8. The mirror uses the lowest bit, which
        # the crop does not.
        crop = ((bits >> np.uint64(32)) * np.uint64(offsets**2) >> np.uint64(32)).astype(np.int64)
        return crop // offsets, crop % offsets, (bits & np.uint64(1)).astype(np.bool_)


AugmentFunction = Callable[[Tensor, int, int, torch.Generator], Tensor]
"""A user's function (sample, index, epoch, generator) -> sample of the same shape and dtype."""


@final
class UserAugment(Augment):
    """A user's function, called for each sample.

    It is found on first need: evaluation never needs it. Its index is that of the sample in the
    training data as they are given, before samples are held out for validation.

    Parameters
    ----------
    seed : int
        The run's seed.
    function : callable or str
        The function, or the text of a run file that names it.
    folder : Path
        The run file's folder.
    """

    by_source_index = True

    def __init__(
        self,
        seed: int,
        function: AugmentFunction | str,
        folder: Path,
    ) -> None:
        super().__init__(seed)
        self._given, self._folder = function, folder

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "function"}
        text = value_text(self._given)
        return state | ({} if " " in text else {"_given": text})  # other processes import it

    @cached_property
    def function(self) -> AugmentFunction:
        """The user's function."""
        function: AugmentFunction = find_value(self._given, self._folder, "augment")
        return function

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Accept every shape."""

    def __call__(self, x: Tensor, indices: Indices, epoch: int) -> Tensor:
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        generator = torch.Generator()
        for row, index in enumerate(indices.tolist()):
            generator.manual_seed(derive_seed("augment", self.seed, epoch, index))
            sample = self.function(x[row].clone(), index, epoch, generator)
            is_tensor = isinstance(sample, Tensor)
            if not is_tensor or (sample.shape, sample.dtype) != (x.shape[1:], x.dtype):
                returned = (
                    f"a tensor of shape {tuple(sample.shape)} and {sample.dtype}"
                    if is_tensor
                    else f"a {type(sample).__name__}"
                )
                raise DataError(
                    "data.augment-result",
                    f"[data] augment '{value_text(self._given)}' returned {returned} for sample "
                    f"{index}: return a tensor of shape {tuple(x.shape[1:])} and {x.dtype}, as the "
                    "sample is",
                )
            result[row] = sample.detach()
        return result

    def check_repeatable(self, x: Tensor, indices: Indices) -> None:
        """Refuse a function that uses random numbers of other generators than the given one, by
        calling it twice for some samples.

        Raises
        ------
        ConfigError
            It uses a global generator, or returns something else the second time.
        DataError
            A result is of another shape or dtype.
        """
        with fixed_random_numbers(0) as uses_generators:
            first = self(x, indices, 0)
            uses_global = uses_generators()
        with fixed_random_numbers(1):
            second = self(x.flip(0), indices[::-1], 0).flip(0)
        if uses_global or first.numpy().tobytes() != second.numpy().tobytes():
            reason = (
                "uses a global generator of random numbers"
                if uses_global
                else "returns another sample when it is called again"
            )
            raise ConfigError(
                "data.augment-not-repeatable",
                f"[data] augment '{value_text(self._given)}' {reason}: draw all random numbers "
                "from the given generator, as torch.rand((), generator=generator)",
            )


AUGMENTS: dict[str, type[CropFlip] | None] = {"none": None, "crop-flip": CropFlip}


def build_augment(
    augment: str | AugmentFunction,
    seed: int,
    folder: Path | None = None,
) -> Augment | None:
    """Make the augmentation of a run file's `[data] augment`; None for "none".

    Parameters
    ----------
    augment : str or callable
        A key of `AUGMENTS`, the text that names a user's function, or the function.
    folder : Path, optional
        The run file's folder.

    Raises
    ------
    ConfigError
        An unknown name.
    """
    if not isinstance(augment, str) or ":" in augment:
        return UserAugment(seed, augment, folder or Path())
    if augment not in AUGMENTS:
        raise unknown_name("augment", augment, [*AUGMENTS, PATTERN])
    kind = AUGMENTS[augment]
    return None if kind is None else kind(seed)


def random_bits(indices: Indices, seed: int) -> NDArray[np.uint64]:
    """Return 64 random bits for each index, whatever the other indices are.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
    2014), which can jump: index i has output i of the generator that starts at `seed`.
    """
    bits = indices.astype(np.uint64) + np.uint64(1)
    bits = bits * np.uint64(SPLITMIX_INCREMENT) + np.uint64(seed)  # uint64 arrays wrap around
    for shift, factor in SPLITMIX_ROUNDS:
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))
