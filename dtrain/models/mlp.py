"""Multi-layer perceptron: `fc1` ... `fcN`, each a linear layer with an activation, then `head`.

Invariant: every layer is one module that flattens its input, so parameters are called
`fc1.weight`, `fc1.bias`, ..., `head.bias`. Initialisation is torch's own for `nn.Linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError, unknown_name
from dtrain.models.layers import NamedFactories

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


@final
@dataclass(frozen=True)
class Mlp:
    """A perceptron with `len(widths)` hidden layers; `widths` may be empty.

    Parameters
    ----------
    widths : tuple of int
        Units of `fc1`, `fc2`, ...; the head has one unit per class.
    activation : str
        A key of `ACTIVATIONS`.

    Raises
    ------
    ConfigError
        Widths that are not whole numbers of at least 1, or an unknown activation.
    """

    widths: tuple[int, ...]
    activation: str = "relu"

    def __post_init__(self) -> None:
        if not isinstance(self.widths, tuple) or not all(
            _is_positive_int(width) for width in self.widths
        ):
            raise ConfigError(
                "model.mlp-widths",
                f"[model] widths = {self.widths!r} must be a list of whole numbers >= 1",
            )
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", str(self.activation), ACTIVATIONS)

    def layers(self, shape: tuple[int, ...], classes: int) -> NamedFactories:
        """Return the layers for samples of `shape`, as (name, factory) pairs.

        ::

            (C, H, W) -> fc1 -> (w1,) -> fc2 -> ... -> fcN -> (wN,) -> head -> (classes,)
        """
        widths = (math.prod(shape), *self.widths)
        hidden = [
            (f"fc{number}", partial(Dense, *pair, ACTIVATIONS[self.activation]))
            for number, pair in enumerate(pairwise(widths), start=1)
        ]
        return [*hidden, ("head", partial(Dense, widths[-1], classes))]


@final
class Dense(nn.Linear):
    """Flatten, linear, activation: (n, ...) to (n, outputs)."""

    uses_rng = False

    def __init__(
        self, inputs: int, outputs: int, activation: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(inputs, outputs)
        self.activation = activation
        self.sums = nn.Identity()  # objectives tap its output, the pre-activations

    def forward(self, input: Tensor) -> Tensor:
        """Return activation(x W^T + b) for the flattened x."""
        preactivation: Tensor = self.sums(super().forward(input.flatten(1)))
        return preactivation if self.activation is None else self.activation(preactivation)


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
