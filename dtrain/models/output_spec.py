"""OutputSpec: the output that a task needs of a model, for one sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import nn

from dtrain.models.layers import NamedFactories


class OutputSpec(NamedTuple):
    """Shape of an output, and the dimension of the classes where each position has some.

    Attributes
    ----------
    shape : tuple of int
        Shape of one sample: (classes,); (classes, *positions) or (*positions, classes); or that of
        targets that are numbers.
    class_axis : 0, -1 or None
        The dimension of the classes; None where the output belongs to the sample as a whole.
    """

    shape: tuple[int, ...]
    class_axis: int | None = None

    @property
    def classes(self) -> int:
        """The numbers of each position, or of the sample."""
        return self.shape[self.class_axis or 0]

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape of the positions, () where the output belongs to the sample as a whole."""
        if self.class_axis is None:
            return ()
        return self.shape[1:] if self.class_axis == 0 else self.shape[:-1]


class OutputModel(ABC):
    """A model of dtrain whose head follows the targets."""

    @abstractmethod
    def layers(self, shape: tuple[int, ...], output: OutputSpec) -> NamedFactories | nn.Module:
        """Return the layers for samples of `shape` that end in an output.

        Raises
        ------
        ConfigError
            The samples or the output do not fit the model.
        """
