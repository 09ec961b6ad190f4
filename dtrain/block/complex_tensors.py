"""Complex tensors as pairs of real numbers, for code that knows real numbers only.

Invariant: a view shares its memory with the tensor, so what is written to one is in both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def real_view(tensor: Tensor) -> Tensor:
    """Return a complex tensor (...) as a real view (..., 2); a real tensor itself."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def view_as_originals(
    views: Mapping[str, Tensor], originals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors in the shapes of `real_view` as complex where the original is complex."""
    return {
        name: torch.view_as_complex(view)
        if name in originals and originals[name].is_complex() and not view.is_complex()
        else view
        for name, view in views.items()
    }
