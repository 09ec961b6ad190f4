"""Where a block stands among the blocks of a run: all that an objective knows when it builds.

Invariant: plain values, pure in the run file and in the data's shape; `later` makes layers under
the run's own seed, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class DownstreamLayer:
    """A layer that comes after a block, or is its last one.

    Attributes
    ----------
    name : str
        Its name in the model.
    outputs : tuple of int
        Shape of one sample that leaves it.
    parameters : int
        Elements of its parameters.
    make : callable
        Returns it anew, with the first weights that the run's seed gives it.
    """

    name: str
    output_shape: tuple[int, ...]
    parameters: int
    make: Callable[[], nn.Module] = field(compare=False, repr=False)


@dataclass(frozen=True)
class BlockSpec:
    """Where one block stands among the blocks of a run.

    Attributes
    ----------
    block, blocks : int
        Its position, and how many there are.
    inputs, outputs : tuple of int
        Shape of one sample that enters and that leaves.
    dtype : torch.dtype
        Of what leaves.
    classes : int
        Number of labels.
    sample : tuple of int
        Shape of one sample of the data.
    above : tuple of int
        Shape that leaves the next block; where cuts are still being balanced, that leaves the next
        layer. Empty in the last block.
    features : tuple of int
        Shape of one sample that enters the block's last layer; in the last block, the model's head.
    samples : int
        Size of the training split.
    raw : bool
        Whether the range of the data is known, so that ``live.image`` can be had.
    frozen : bool
        Whether a user asked that its layers keep their first weights.
    top : Later or None
        The block's last layer, where the objective looks `ahead`.
    later : tuple of Later
        All layers after the block, where the objective looks `ahead`.
    """

    index: int
    blocks: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    classes: int
    sample_shape: tuple[int, ...] = ()
    next_output_shape: tuple[int, ...] = ()
    feature_shape: tuple[int, ...] = ()
    train_samples: int = 0
    has_raw_samples: bool = False
    frozen: bool = False
    last_layer: DownstreamLayer | None = None
    downstream_layers: tuple[DownstreamLayer, ...] = ()

    @classmethod
    def from_data(
        cls,
        sample_shape: tuple[int, ...],
        classes: int,
        train_samples: int = 0,
        has_raw_samples: bool = False,
    ) -> BlockSpec:
        """Return what is known of the data, in the place of a net of one block."""
        shapes = sample_shape, (classes,), torch.float32
        return cls(
            0,
            1,
            *shapes,
            classes,
            sample_shape,
            train_samples=train_samples,
            has_raw_samples=has_raw_samples,
        )

    @property
    def is_last(self) -> bool:
        """Whether this block ends in the model's own head."""
        return self.index == self.blocks - 1
