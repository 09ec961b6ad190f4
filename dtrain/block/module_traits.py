"""What a layer might do beside returning a result: draw random numbers, or write in place.

Invariant: read from the modules' types and attributes alone, nothing is run; where a type does not
tell, it is taken to draw.
"""

from __future__ import annotations

from torch import nn

from dtrain.block.split_backward import LEAF_MODULES

# Layers made of these alone never draw random numbers, so they need no generator of their own.
DETERMINISTIC_MODULES = (
    *LEAF_MODULES,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    *(nn.LayerNorm, nn.GroupNorm, nn.Flatten, nn.Identity),
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Hardtanh),
)


def works_in_place(layer: nn.Module) -> bool:
    """Tell whether a layer works in place, as far as its modules say."""
    return any(getattr(module, "inplace", False) for module in layer.modules())


def may_use_rng(layer: nn.Module) -> bool:
    """Tell whether a layer might use random numbers: any module inside that is not known calm.

    A subclass may do what its parent does not, so a user's class is calm only if it says so,
    by an attribute ``draws = False``.
    """
    return not all(_is_deterministic(module) for module in layer.modules())


def _is_deterministic(module: nn.Module) -> bool:
    own = type(module).forward.__module__.startswith("torch.nn.modules.")
    known = own and isinstance(module, (*DETERMINISTIC_MODULES, nn.Sequential))
    return known or getattr(module, "uses_rng", True) is False
