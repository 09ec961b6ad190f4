"""Low-rank weights: a layer's weight as a product of two or three factors.

Invariant: the layer computes what it would with the product as its weight, up to rounding, and code
that reads its weight gets the product. The layer keeps its class, its `forward` and its hooks.

::

    weight (a, ...)  =  left (a, k) @ right (k, b)        b: all dimensions behind the first
                     =  left (a, k) @ core (k, k) @ right (k, b)

    linear, convolution    x -- right --> k numbers -- left --> y      where that is less work,
                           x -- left @ right --> y                     otherwise

The factors are parameters of the layer, and its weight is a `FactoredWeight`: a tensor that
`linear` and the convolutions apply factor by factor. The right factor of a convolution has k
channels, its left one a kernel of one pixel. A core is applied between them to few rows,
otherwise it is multiplied into `left` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, final

import torch
from torch import Tensor, matmul, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

FACTOR_NAMES = {2: ("left", "right"), 3: ("left", "core", "right")}
"""Names of the factors, by their number."""


LOW_RANK_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight can be factorized."""


FACTORS_MODULE = "low_rank"
"""Name of the factors' module inside the layer: ``<layer>.low_rank.left``."""


class FactoredWeight(Tensor):
    """A weight that is the product of factors, computed only where it is needed.

    `linear` and the convolutions apply the factors in turn where that is less work; every other
    function of torch gets the product.

    Attributes
    ----------
    factors : tuple of Tensor
        From left to right: (a, k), maybe (k, k), (k, b).
    weight_shape : torch.Size
        Shape of the weight.
    """

    factors: tuple[Tensor, ...]
    weight_shape: torch.Size

    @staticmethod
    def of(factors: Sequence[Tensor], shape: torch.Size) -> FactoredWeight:
        """Return the weight of this shape that is the product of `factors`."""
        placeholder = factors[0].detach().new_empty(()).expand(shape)  # shape and dtype, no memory
        weight: FactoredWeight = placeholder.as_subclass(FactoredWeight)
        weight.factors = tuple(factors)
        weight.weight_shape = shape
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with the product, or let it apply the factors in turn."""
        apply_factors = FACTOR_FUNCTIONS.get(func)
        if apply_factors is not None:
            output = apply_factors(*args, **(kwargs or {}))
            if output is not None:
                return output
        args, kwargs = tree_map(_product_of, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def product(self) -> Tensor:
        """Return the product, with its graph."""
        return reduce(matmul, self.factors).view(self.weight_shape)

    def factors_in_turn(self, rows: int) -> Sequence[Tensor] | None:
        """Return the factors to apply to so many rows, the last first; None for the product.

        The way with the fewest multiplications is chosen. A core is a separate factor, or part of
        the left factor.
        """
        a, b, k = self.weight_shape[0], self.weight_shape[1:].numel(), len(self.factors[-1])
        core = k * k * (len(self.factors) - 2)
        in_turn = rows * k * (a + b) + min(a, rows) * core
        if in_turn >= a * (core + k * b) + rows * a * b:
            return None
        if rows < a:
            return self.factors
        return [reduce(matmul, self.factors[:-1]), self.factors[-1]]


def _product_of(value: Any) -> Any:
    return value.product() if isinstance(value, FactoredWeight) else value


def _factored_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Return `linear` by factors, None where the product is less work."""
    if not isinstance(weight, FactoredWeight):
        return None
    factors = weight.factors_in_turn(x.numel() // x.shape[-1])
    if factors is None:
        return None
    for factor in reversed(factors[1:]):
        x = functional.linear(x, factor)
    return functional.linear(x, factors[0], bias)


def _factored_conv(
    conv: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return a convolution by factors, None where the product is less work."""
    if not isinstance(weight, FactoredWeight) or groups > 1:
        return None
    _, channels, *kernel = weight.weight_shape
    step = stride ** len(kernel) if isinstance(stride, int) else math.prod(stride)
    factors = weight.factors_in_turn(x.numel() // channels // step)
    if factors is None:
        return None
    *outer, right = factors
    x = conv(x, right.view(len(right), channels, *kernel), None, stride, padding, dilation)
    pixel = [1] * len(kernel)
    for factor in reversed(outer[1:]):
        x = conv(x, factor.view(*factor.shape, *pixel))
    return conv(x, outer[0].view(*outer[0].shape, *pixel), bias)


FACTOR_FUNCTIONS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.linear: _factored_linear,
    **{
        conv: partial(_factored_conv, conv)
        for conv in (functional.conv1d, functional.conv2d, functional.conv3d)
    },
}
"""Functions of torch that apply the factors of a weight in turn."""


@final
class LowRankWeight:
    """The factors of one layer's weight, until they are merged.

    Parameters
    ----------
    layer : nn.Module
        One of `LOW_RANK_LAYERS`, or of a subclass.
    factors : Tensor
        Of shapes (a, k) and (k, b), between them one of (k, k) if there are three; they become
        parameters.

    Attributes
    ----------
    shape : torch.Size
        Of the weight.
    factor_names : tuple of str
        left, right; or left, core, right.
    """

    def __init__(self, layer: nn.Module, *factors: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        self.layer = layer
        self.shape = layer.weight.shape
        self.factor_names = FACTOR_NAMES[len(factors)]
        self._parameters = nn.ParameterDict(dict(zip(self.factor_names, factors, strict=True)))
        del layer.weight
        layer.add_module(FACTORS_MODULE, self._parameters)
        self.show()

    @property
    def factors(self) -> list[nn.Parameter]:
        """The factors, from left to right."""
        return [self._parameters[name] for name in self.factor_names]

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

    def product(self) -> Tensor:
        """Return the weight, with its graph."""
        return FactoredWeight.of(self.factors, self.shape).product()

    def show(self, weight: Tensor | None = None) -> None:
        """Let the layer compute with `weight`; by default with the product of the factors."""
        self.layer.weight = (
            FactoredWeight.of(self.factors, self.shape) if weight is None else weight
        )

    def set_factors(self, *factors: Tensor) -> None:
        """Replace the factors, maybe by those of another rank; frozen ones stay frozen."""
        for name, old, new in zip(self.factor_names, self.factors, factors, strict=True):
            self._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        self.show()

    def set_trainable(self, *names: str) -> None:
        """Train the factors of these names and freeze the others."""
        for name, factor in zip(self.factor_names, self.factors, strict=True):
            factor.requires_grad_(name in names)

    def merge(self) -> None:
        """Give the layer a plain weight again: the product, as a new parameter."""
        weight = nn.Parameter(self.product().detach())
        del self.layer.weight
        delattr(self.layer, FACTORS_MODULE)
        self.layer.weight = weight
        parameters = self.layer._parameters  # the weight goes back to the first place
        for name in [name for name in parameters if name != "weight"]:
            parameters[name] = parameters.pop(name)


def merged_parameters(layer: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a layer, detached, in their order; products in place of factors."""
    for name, module in layer.named_modules():
        if {"parametrizations", FACTORS_MODULE}.intersection(name.split(".")):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, FactoredWeight) or parametrize.is_parametrized(module, "weight"):
            assert isinstance(weight, Tensor)
            yield weight.detach()
        yield from (
            parameter.detach() for parameter in module._parameters.values() if parameter is not None
        )


def is_factorizable(module: nn.Module) -> bool:
    """Return whether the weight of a layer can be factorized: a real parameter, not a product."""
    return (
        isinstance(module, LOW_RANK_LAYERS)
        and isinstance(module.weight, nn.Parameter)
        and not module.weight.is_complex()
    )
