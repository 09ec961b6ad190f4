"""Any optimizer of `torch.optim`, by its name in kebab or lower case, with its own fields.

Invariant: one optimizer per block; a name or a field that torch does not have is refused before
anything is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn, optim

from dtrain.errors import Refusal, unknown

# LBFGS evaluates its loss again and again, SparseAdam needs sparse gradients.
UNFIT = {"lbfgs", "sparseadam", "optimizer"}


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
                (each.replace("_", "-") for each in legal),
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


def _kind(name: str) -> type[optim.Optimizer]:
    legal = names()
    kind = legal.get(name.replace("-", "").lower())
    if kind is None:
        raise unknown("optimizer", name, legal)
    return kind
