"""Factors: the matrix of a linear map or a convolution as a product of two or three, in its place.

Invariant: the layer computes what it would with the product as its weight, up to rounding; whoever
asks for its weight is given the product.

::

    weight (a, ...)  =  left (a, k) @ right (k, b)        b: all dimensions behind the first
                     =  left (a, k) @ core (k, k) @ right (k, b)

    linear, convolution    x -- right --> k numbers -- left --> y      where that is less work,
                           x -- left @ right --> y                     else

A convolution's right factor is one of k channels, its left one of one pixel. A core stands between
them where few rows come, else it is multiplied into `left` first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, final

import torch
from torch import Tensor, matmul, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

FACTOR_NAMES = {2: ("left", "right"), 3: ("left", "core", "right")}
"""What factors are called, by how many there are."""


@final
class ProductParametrization(nn.Module):
    """What torch's parametrisation calls for the weight."""

    def __init__(self, shape: torch.Size, initial_factors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.shape, self.weight_override = shape, None
        self._initial_factors = initial_factors

    weight_override: Tensor | None

    def forward(self, *factors: Tensor) -> Tensor:
        """Return the product, or the weight that is shown instead."""
        return (
            reduce(matmul, factors).view(self.shape)
            if self.weight_override is None
            else self.weight_override
        )

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the factors to begin with."""
        return self._initial_factors


@final
class LowRankWeight:
    """A layer whose weight is a product, until it is dissolved.

    Parameters
    ----------
    module : nn.Module
        One of `THIN`, or derived from one.
    sides : Tensor
        Of shapes (a, k) and (k, b), between them one of (k, k) if there are three; they become
        parameters.

    Attributes
    ----------
    names : tuple of str
        What each is called: left, right; left, core, right.
    """

    def __init__(self, module: nn.Module, *factors: Tensor) -> None:
        self.module, self.factor_names = module, FACTOR_NAMES[len(factors)]
        shape = module.weight.shape
        assert isinstance(shape, torch.Size)
        self.product = ProductParametrization(shape, factors)
        parametrize.register_parametrization(module, "weight", self.product, unsafe=True)
        # Behind the layer's own class, so that what this makes of a map stays as it is.
        kind = next(thin for base, thin in LOW_RANK_CLASSES.items() if isinstance(module, base))
        module.__class__ = type(type(module).__name__, (type(module), kind), {})
        module.__dict__["low_rank_forward"] = self.low_rank_forward

    @property
    def factors(self) -> list[nn.Parameter]:
        """The factors, from left to right."""
        own: Any = self.module.parametrizations.weight  # type: ignore[union-attr]
        return [getattr(own, f"original{place}") for place in range(len(self.factor_names))]

    @property
    def left(self) -> nn.Parameter:
        """The left factor."""
        return self.factors[0]

    @property
    def right(self) -> nn.Parameter:
        """The right factor."""
        return self.factors[-1]

    @property
    def rank(self) -> int:
        """Columns of the left factor (k)."""
        return len(self.right)

    def set_factors(self, *factors: Tensor) -> None:
        """Take others, of another rank, say; what rested rests."""
        own: Any = self.module.parametrizations.weight  # type: ignore[union-attr]
        for place, (old, new) in enumerate(zip(self.factors, factors, strict=True)):
            setattr(own, f"original{place}", nn.Parameter(new, requires_grad=old.requires_grad))

    def set_trainable(self, *names: str) -> None:
        """Let these factors learn, and no others."""
        for name, side in zip(self.factor_names, self.factors, strict=True):
            side.requires_grad_(name in names)

    def merge(self) -> None:
        """Give the layer its weight back: the product, a new parameter."""
        self.left.requires_grad_(True)  # torch makes a parameter of what can learn alone
        del self.module.__dict__["low_rank_forward"]
        self.module.__class__ = type(self.module).__bases__[0]
        parametrize.remove_parametrizations(self.module, "weight", leave_parametrized=True)
        own = self.module._parameters  # where the weight came first, and shall again
        for name in [each for each in own if each != "weight"]:
            own[name] = own.pop(name)

    def low_rank_forward(self, x: Tensor) -> Tensor | None:
        """Return the map of `x` by thin ones in turn, None where one whole map is less work."""
        module, shape = self.module, self.product.shape
        if self.product.weight_override is not None or (sides := self._cheapest_factors(x)) is None:
            return None
        *outer, right = sides
        biases: list[Any] = [None] * len(outer[1:]) + [module.bias]
        if isinstance(module, nn.Linear):
            made = linear(x, right)
            for side, bias in zip(reversed(outer), biases, strict=True):
                made = linear(made, side, bias)
            return made
        assert isinstance(module, nn.modules.conv._ConvNd)
        made = module._conv_forward(x, right.view(self.rank, *shape[1:]), None)
        call = getattr(nn.functional, f"conv{len(shape) - 2}d")
        for side, bias in zip(reversed(outer), biases, strict=True):
            made = call(made, side.view(*side.shape, *[1] * (len(shape) - 2)), bias)
        return made

    def _cheapest_factors(self, x: Tensor) -> Sequence[Tensor] | None:
        """Return by what to map `x` in turn, the last first, None for the whole weight at once.

        By the least number of products. A core is a map of its own, or part of the left factor.
        """
        module, shape = self.module, self.product.shape
        sides: list[Tensor] = [*self.factors]
        a, b, k = shape[0], math.prod(shape[1:]), self.rank
        count = x.numel() // x.shape[-1]
        if isinstance(module, nn.modules.conv._ConvNd):
            if module.groups > 1:
                return None
            count = x.numel() // shape[1] // math.prod(module.stride)
        core = k * k * (len(sides) - 2)
        thin = count * k * (a + b) + min(a, count) * core
        if thin >= a * (core + k * b) + count * a * b:
            return None
        return sides if count < a else [reduce(matmul, sides[:-1]), sides[-1]]


def _low_rank_class(base: Any) -> type[nn.Module]:
    """Return a class that stands behind a layer's own and maps by factors where those are thin."""

    def forward(self: Any, input: Tensor) -> Tensor:
        made: Tensor | None = self.low_rank_forward(input)
        whole: Tensor = base.forward(self, input) if made is None else made
        return whole

    return type(f"Thin{base.__name__}", (base,), {"forward": forward})


LOW_RANK_CLASSES = {
    base: _low_rank_class(base) for base in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}
"""What can have factors, and what it then maps by."""


def merged_parameters(layer: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a layer, detached, in their order; products for factors."""
    for name, module in layer.named_modules():
        if "parametrizations" in name.split("."):
            continue
        if parametrize.is_parametrized(module, "weight"):
            weight = module.weight
            assert isinstance(weight, Tensor)
            yield weight.detach()
        yield from (each.detach() for each in module._parameters.values() if each is not None)


def is_factorizable(module: nn.Module) -> bool:
    """Say whether a layer is of a kind that can have factors, and is not one of others already."""
    return isinstance(module, tuple(LOW_RANK_CLASSES)) and not parametrize.is_parametrized(module)
