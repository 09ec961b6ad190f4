"""Two copies of a layer: one that learns, and one that follows the layer slowly.

Invariant: no gradient reaches the weights of the slow copy, and nothing but `follow` moves them.

::

            .-- learnt --.
    h ------|            (+)--> LB(h) + EMA(h)
            '-- slow ----'         slow <- m slow + (1 - m) theta, theta the layer's parameters
"""

from __future__ import annotations

from copy import deepcopy
from typing import final

import torch
from torch import Tensor, nn

from dtrain.factors import plain

NOTHING = torch.empty(0, dtype=torch.float32)
"""All parameters of a layer without any."""


@final
class Pair(nn.Module):
    """The two copies; `layer` becomes one of them, and both are drawn `anew` where that is asked.

    Parameters
    ----------
    layer : nn.Module
        A layer that nobody else holds.
    anew : bool
        Whether the copies start from other weights, each from its own.
    """

    def __init__(self, layer: nn.Module, anew: bool = False) -> None:
        super().__init__()
        self.learnt, self.slow = layer, deepcopy(layer).requires_grad_(False)
        self.writing = any(getattr(each, "inplace", False) for each in layer.modules())
        if anew:
            _draw(self.learnt)
            _draw(self.slow)

    def forward(self, input: Tensor) -> Tensor:
        """Return the sum of what both make of the same input."""
        first, second = (input.clone(), input.clone()) if self.writing else (input, input)
        made: Tensor = self.learnt(first) + self.slow(second)
        return made

    @torch.no_grad()
    def follow(self, theta: Tensor, momentum: float) -> None:
        """Average `theta`, the flat parameters of the layer that was copied, into the slow copy."""
        own = list(self.slow.parameters())
        parts = torch.split(theta, [each.numel() for each in own])
        for each, new in zip(own, parts, strict=True):
            each.mul_(momentum).add_(new.view_as(each), alpha=1 - momentum)


def flat(layer: nn.Module) -> Tensor:
    """Return all parameters of a layer in one row, in new memory."""
    parts = [each.flatten() for each in plain(layer)]
    return torch.cat(parts) if parts else NOTHING


def _draw(layer: nn.Module) -> None:
    """Draw the weights of convolutions anew, normal with variance 2 / (k^2 outputs), and linear
    maps as torch does."""
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
