r"""Augmentation: images are changed as they are read, by draws that belong to sample and epoch.

Invariant: a sample's draw is pure in (seed, epoch, index): batch, order, layout, thread and every
generator's state leave it as it is, and so does the numpy that is installed. Labels never change.

::

    sample 8x8       mirrored or not       padded to 16x16, cropped to 8x8
    +--------+         +--------+          0 0 0 0 0 0 0 0
    |  /|    |         |    |\  |          0 0+--------+
    |   |    |   ->    |    |   |   ->     0 0|    |\  |       first row and column 0 ... 8,
    |   |    |         |    |   |          0 0|    |   |       each as likely as the others
    +--------+         +--------+          0 0|    |   |
                                           0 0+--------+
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from dtrain.data.sampler import Indices
from dtrain.errors import ConfigError, unknown_name
from dtrain.rng import derive_seed

PAD = 4
"""Pixels of zero around an image before it is cropped."""


GOLDEN = 0x9E3779B97F4A7C15


MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class Augment(ABC):
    """What is done to training samples when they are read.

    Parameters
    ----------
    seed : int
        The run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse samples of a shape that this cannot be done to.

        Raises
        ------
        DtrainError
            Says the shape.
        """

    @abstractmethod
    def __call__(self, x: Tensor, indices: Indices, epoch: int) -> Tensor:
        """Return new samples of x's shape and dtype; x is left as it was.

        Parameters
        ----------
        x : Tensor
            Samples, (n, *shape).
        indices : array
            Which samples of the training split they are, (n,).
        epoch : int
            From 0.
        """


@final
class CropFlip(Augment):
    """Mirror one image in two, pad by 4 zeros, crop at random to the size before.

    As He et al. 2015 (Deep residual learning, section 4.2) train on CIFAR. The zeros come after
    standardisation, so the border has the training split's mean colour; without it, it is black.
    """

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise ConfigError(
                "todo.key",
                f'[data] augment = "crop-flip" is for images (channels, height, width): these '
                f'samples have shape {shape}: give augment = "none"',
            )

    def __call__(self, x: Tensor, indices: Indices, epoch: int) -> Tensor:
        n, channels, height, width = x.shape
        top, left, mirrored = self.draw(indices, epoch)
        # In numpy: this may run in a thread of its own, where torch would start its own team.
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
        """Return first row and column of each crop, 0 ... 2 * PAD, and whether it is mirrored."""
        bits = random_bits(indices, derive_seed("augment", self.seed, epoch))
        places = 2 * PAD + 1
        # A product's upper half is uniform to 2e-8; the mirror has bits of its own.
        place = ((bits >> np.uint64(32)) * np.uint64(places**2) >> np.uint64(32)).astype(np.int64)
        return place // places, place % places, (bits & np.uint64(1)).astype(np.bool_)


AUGMENTS: dict[str, type[Augment] | None] = {"none": None, "crop-flip": CropFlip}


def build_augment(name: str, seed: int) -> Augment | None:
    """Return the named augmentation, or None for "none".

    Raises
    ------
    DtrainError
        An unknown name.
    """
    if name not in AUGMENTS:
        raise unknown_name("augment", name, AUGMENTS)
    kind = AUGMENTS[name]
    return None if kind is None else kind(seed)


def random_bits(indices: Indices, seed: int) -> NDArray[np.uint64]:
    """Return 64 random bits for each index, the same in whatever company it is drawn.

    SplitMix64 (Steele, Lea & Flood 2014), which can jump: output number i of the seed `start`.
    """
    bits = indices.astype(np.uint64) + np.uint64(1)
    bits = bits * np.uint64(GOLDEN) + np.uint64(seed)  # arrays of uint64 wrap around
    for shift, factor in MIX:
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))
