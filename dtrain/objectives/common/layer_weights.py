"""The weights of a layer as one message.

Invariant: the order is that of the layer's parameters, equal on every rank that has the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtrain.block.low_rank import merged_parameters

NO_PARAMETERS = torch.empty(0, dtype=torch.float32)
"""The message of a layer without parameters."""


def flat_parameters(layer: nn.Module) -> Tensor:
    """Return all parameters of a layer as one vector, in new memory."""
    parts = [parameter.flatten() for parameter in merged_parameters(layer)]
    return torch.cat(parts) if parts else NO_PARAMETERS


def split_like(theta: Tensor, layer: nn.Module) -> list[Tensor]:
    """Return the parts of flat parameters (parameters,), each in the shape of its parameter."""
    parameters = list(layer.parameters())
    parts = torch.split(theta, [parameter.numel() for parameter in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
