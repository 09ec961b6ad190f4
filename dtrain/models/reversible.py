"""Reversible layers: their input follows from their output.

A layer that derives from `Reversible` splits its input into two streams, the halves of dimension 1,
and adds to one stream a function of the other one. Under the schedule `petra` a block of such
layers keeps no activations.

::

    AdditiveCoupling(f, g)    y1 = x1 + f(x2)        x2 = y2 - g(y1)
                              y2 = x2 + g(y1)        x1 = y1 - f(x2)

    ResidualCoupling(f)       y1 = x2                x2 = y1
                              y2 = x1 + f(x2)        x1 = y2 - f(y1)

Two layers of the second kind, with f and g, compute one of the first kind.

Invariant: ``inverse(forward(x)) == x`` up to rounding, with the same weights and buffers; f and g
may be any modules that keep the shape of a stream.

Sources: Dinh et al. 2014, "NICE", arXiv 1410.8516 (additive coupling); Gomez et al. 2017, "The
Reversible Residual Network", arXiv 1707.04585.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dtrain.errors import ConfigError

STREAM_DIMENSION = 1


class Reversible(nn.Module):
    """A layer whose input follows from its output.

    A subclass of your own defines `forward` and `inverse`.
    """

    @abstractmethod
    def inverse(self, output: Tensor) -> Tensor:
        """Return the input (rows, ...) of which the layer, as it is now, makes `output`."""


@final
class AdditiveCoupling(Reversible):
    """Add f of the second stream to the first one, then g of the first stream to the second one.

    Parameters
    ----------
    f, g : nn.Module
        Any modules that return the shape of their input, (rows, C / 2, ...). One of them may draw
        random numbers, not both: `inverse` calls g first.

    Raises
    ------
    ConfigError
        Both have dropout.
    """

    uses_rng = False

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        if _has_dropout(f) and _has_dropout(g):
            raise ConfigError(
                "model.coupling-random",
                "f and g of an AdditiveCoupling both have dropout, but its inverse would draw "
                "their random numbers in another order: use two ResidualCoupling layers, one with "
                "f and one with g",
            )
        self.f = f
        self.g = g

    def forward(self, input: Tensor) -> Tensor:
        """Return the two new streams (rows, C, ...)."""
        x1, x2 = split_streams(input)
        y1 = x1 + _change(self.f, x2)
        return join_streams(y1, x2 + _change(self.g, y1))

    def inverse(self, output: Tensor) -> Tensor:
        """Return the two streams before the layer (rows, C, ...)."""
        y1, y2 = split_streams(output)
        x2 = y2 - _change(self.g, y1)
        return join_streams(y1 - _change(self.f, x2), x2)


class ResidualCoupling(Reversible):
    """Add f of the second stream to the first one, and exchange the streams.

    Parameters
    ----------
    f : nn.Module
        Any module that returns the shape of its input, (rows, C / 2, ...).
    """

    uses_rng = False

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, input: Tensor) -> Tensor:
        """Return the two new streams (rows, C, ...)."""
        x1, x2 = split_streams(input)
        return join_streams(x2, x1 + _change(self.f, x2))

    def inverse(self, output: Tensor) -> Tensor:
        """Return the two streams before the layer (rows, C, ...)."""
        x2, y2 = split_streams(output)
        return join_streams(y2 - _change(self.f, x2), x2)


def split_streams(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two halves of dimension 1.

    Raises
    ------
    ConfigError
        Dimension 1 is missing or odd.
    """
    if input.ndim < 2 or input.shape[STREAM_DIMENSION] % 2:
        raise ConfigError(
            "model.streams-unequal",
            f"a reversible layer has two streams, the halves of dimension 1, but its input has "
            f"shape {tuple(input.shape)}: use an even number of channels",
        )
    first, second = input.chunk(2, STREAM_DIMENSION)
    return first, second


def join_streams(first: Tensor, second: Tensor) -> Tensor:
    """Return both streams in one tensor."""
    return torch.cat([first, second], STREAM_DIMENSION)


def _has_dropout(module: nn.Module) -> bool:
    return any(isinstance(m, _DropoutNd) and m.p > 0 for m in module.modules())


def _change(function: nn.Module, stream: Tensor) -> Tensor:
    """Return what a function of one stream adds to the other stream."""
    version = stream._version
    change: Tensor = function(stream)
    if stream._version != version:
        raise ConfigError(
            "model.coupling-in-place",
            "the function of a reversible layer works in place on its input, which the layer "
            "still needs: set inplace=False in its first module",
        )
    if change.shape != stream.shape:
        raise ConfigError(
            "model.coupling-shape",
            f"the function of a reversible layer returns {tuple(change.shape)} for a stream of "
            f"{tuple(stream.shape)}: it must keep the shape",
        )
    return change
