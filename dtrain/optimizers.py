"""Any optimizer of `torch.optim`, by its name in kebab or lower case, and the clip before it.

Invariant: one optimizer per block; a name or a field that torch does not have is refused before
anything is built. A clip turns no finite gradient into one that is not.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from dtrain.errors import Refusal, unknown

# LBFGS evaluates its loss again and again, SparseAdam needs sparse gradients.
UNFIT = {"lbfgs", "sparseadam", "optimizer"}

OURS = ("clip", "clip_over", "scale_from")
"""Keys of [optimizer] that are no field of torch's; `keys.Step` holds them."""

LR = 1e-3
"""Of torch's SGD, where none is given."""

EPSILON = 1e-6
"""What torch adds to a norm before it divides by it."""


def names() -> dict[str, type[optim.Optimizer]]:
    """Return the optimizers of the installed torch that a run file may name."""
    found = inspect.getmembers(optim, inspect.isclass)
    legal = {name.lower(): kind for name, kind in found if issubclass(kind, optim.Optimizer)}
    return {name: kind for name, kind in legal.items() if name not in UNFIT}


def check(name: str, fields: Mapping[str, Any]) -> None:
    """Refuse an unknown optimizer, an unknown field, or a value that the optimizer rejects."""
    kind = _kind(name)
    legal = list(inspect.signature(kind).parameters)[1:]
    for field in fields:
        if field not in legal:
            raise unknown(
                f"key in [optimizer] of '{name}'",
                field.replace("_", "-"),
                (each.replace("_", "-") for each in (*legal, *OURS)),
            )
    make(name, fields, [nn.Parameter(torch.zeros(2, 2))])


def make(
    name: str, fields: Mapping[str, Any], parameters: Iterable[nn.Parameter]
) -> optim.Optimizer:
    """Return the optimizer `name` over `parameters`, which it updates in place."""
    try:
        return _kind(name)(parameters, **fields)
    except (TypeError, ValueError, RuntimeError, LookupError, AssertionError) as error:
        raise Refusal(f"[optimizer] '{name}' refuses {dict(fields)}: {error}") from error


def squares(gradients: Sequence[Tensor]) -> float:
    """Return the sum of the squares of all elements, each tensor's made in float64.

    The tensors' sums are added in the order given: the same bits in every repetition on as many
    threads. Those of several blocks may be added for the norm of a whole model.
    """
    norms = (torch.linalg.vector_norm(each, dtype=torch.float64) for each in gradients)
    return sum((float(norm) ** 2 for norm in norms), 0.0)


def clip_(gradients: Sequence[Tensor], norm: float, most: float) -> None:
    """Multiply gradients by ``most / (norm + 1e-6)`` in place, where that is less than 1.

    The rule of `torch.nn.utils.clip_grad_norm_`, to rounding. A norm that is NaN or infinite
    leaves the gradients as they are: they are no direction at any length, and the checks of losses
    and weights name what is wrong.

    Parameters
    ----------
    norm : float
        The L2 norm that is limited: ``sqrt(squares(gradients))``, or that of a whole model.
    most : float
        The largest norm, more than 0.
    """
    scale = most / (norm + EPSILON)
    if math.isfinite(norm) and scale < 1:
        for gradient in gradients:
            gradient.mul_(scale)


def _kind(name: str) -> type[optim.Optimizer]:
    legal = names()
    kind = legal.get(name.replace("-", "").lower())
    if kind is None:
        raise unknown("optimizer", name, legal)
    return kind
