"""Modules that are measured on the CPU, on zeros, and not on the meta device.

On the meta device torch computes shapes in Python. Its first such call imports sympy and the
compiler, which takes about a second on each rank. Modules of the classes here have the same shapes
and multiply-adds on the CPU, and a small one runs there in milliseconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

PLAIN_CLASSES: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Dropout),
        *(nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm),
        *(nn.RMSNorm, nn.Embedding),
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
        *(nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Softplus),
    }
)
"""Classes of torch that run in the same operations on both devices."""


MAX_MACS = 1 << 25
"""Multiply-adds of the forward that a small module has at most: 10 ms with the backward."""


MAX_ELEMENTS = 1 << 21
"""Elements of the inputs of a small module."""


def is_small(modules: Iterable[nn.Module], shape: tuple[int, ...], rows: int = 1) -> bool:
    """Return whether modules are plain, and need little time and memory for samples of a shape.

    The multiply-adds are those of the forward, estimated from the shape of the first input: the
    true number is not known before the modules have run.
    """
    macs, elements = 0, math.prod(shape)
    for part in (part for module in modules for part in module.modules()):
        if type(part) not in PLAIN_CLASSES and not type(part).__module__.startswith("dtrain."):
            return False
        for parameter in part.parameters(recurse=False):
            positions = math.prod(shape[1:]) if parameter.dim() > 2 else 1
            if isinstance(part, nn.Linear):
                positions = elements // part.in_features
            macs += parameter.numel() * max(1, positions)
    return macs * rows <= MAX_MACS and elements * rows <= MAX_ELEMENTS


def has_hidden_memory(layers: Mapping[str, nn.Module], head: nn.Module | None) -> bool:
    """Return whether the backward of a module needs memory whose size only a real run shows: that
    of oneDNN, which computes LSTMs in float32."""
    modules = [
        part for layer in (*layers.values(), head) if layer is not None for part in layer.modules()
    ]
    return any(
        isinstance(part, nn.LSTM) and part.weight_hh_l0.dtype == torch.float32 for part in modules
    )


def zeros_on_cpu(module: nn.Module) -> nn.Module:
    """Return a copy on the CPU whose parameters and buffers are zeros."""
    zeros: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        zero = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        is_parameter = isinstance(tensor, nn.Parameter)
        zeros[id(tensor)] = nn.Parameter(zero, tensor.requires_grad) if is_parameter else zero
    return copy.deepcopy(module, zeros)
