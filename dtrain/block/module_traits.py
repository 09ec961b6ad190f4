"""Traits of a layer besides its output: it may use random numbers, work in place, or skip parts.

Invariant: only types and attributes of modules are read; nothing is run. A module of an unknown
type counts as one that uses random numbers, and as one that may skip its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from dtrain.block.split_backward import LEAF_MODULES

DETERMINISTIC_MODULES = (
    *LEAF_MODULES,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Flatten, nn.Identity),
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Hardtanh),
)
"""Modules that never use random numbers, so that their layers are not seeded."""


def works_in_place(layer: nn.Module) -> bool:
    """Return whether a module of the layer has an attribute ``inplace = True``."""
    return any(getattr(module, "inplace", False) for module in layer.modules())


def may_use_rng(layer: nn.Module) -> bool:
    """Return whether a layer may use random numbers: a module of it is not known not to.

    A subclass may use them where its parent does not. So a user's class counts as deterministic
    only with an attribute ``uses_rng = False``.
    """
    return not all(_is_deterministic(module) for module in layer.modules())


def may_skip_parameters(module: nn.Module) -> bool:
    """Return whether some forwards may leave out parameters that others use.

    The forwards of torch and dtrain use the same parameters every time; others may branch.
    """
    return not all(
        type(part).forward.__module__.startswith(("torch.nn.", "dtrain."))
        for part in module.modules()
    )


def first_replica_buffers(module: nn.Module) -> Sequence[str]:
    """Return the names of a module's buffers that have no mean: one replica's are right for all.

    These are the singular vectors of spectral norm, whose means over replicas may cancel, and the
    buffers that a user's module lists in an attribute ``first_replica_buffers``.
    """
    names = [*getattr(module, "first_replica_buffers", ())]
    if isinstance(module, _SpectralNorm):
        names += ["_u", "_v"]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            names += [f"{hook.name}_u", f"{hook.name}_v"]
    return names


def _is_deterministic(module: nn.Module) -> bool:
    from_torch = type(module).forward.__module__.startswith("torch.nn.modules.")
    is_known = from_torch and isinstance(module, (*DETERMINISTIC_MODULES, nn.Sequential))
    is_known |= from_torch and isinstance(module, nn.RNNBase) and not module.dropout
    return is_known or getattr(module, "uses_rng", True) is False
