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

from dtrain.errors import ConfigError, unknown_name


def scale_lr_and_momentum(
    lr: float, momentum: float, batch_size: int, reference_batch_size: int
) -> tuple[float, float]:
    """Return learning rate and momentum for a batch, given those for a reference batch.

    m = m_r^(N / N_r), and lr = lr_r (1 - m) N / ((1 - m_r) N_r): per sample a gradient decays as
    fast and moves the weights as far in all; weight decay stays as it is.

    Source: Chiley et al. 2019, "Online Normalization for Training Neural Networks".

    >>> lr, momentum = scaled(0.1, 0.9, batch=1, reference=128)
    >>> f"{lr:.4g} {momentum:.8f}"
    '6.428e-06 0.99917721'
    """
    part = batch_size / reference_batch_size
    scaled_momentum = momentum**part
    return lr * part * (1 - scaled_momentum) / (1 - momentum), scaled_momentum


# LBFGS evaluates its loss again and again, SparseAdam needs sparse gradients.
UNSUPPORTED = {"lbfgs", "sparseadam", "optimizer"}


EXTRA_KEYS = ("clip", "clip_over", "scale_from")
"""Keys of [optimizer] that are no field of torch's; `keys.Step` holds them."""


IMPLEMENTATION_FIELDS = {"fused", "foreach", "capturable", "differentiable"}
"""Fields that choose how torch steps; with any of them it is asked for no other way."""


DEFAULT_LR = 1e-3
"""Of torch's SGD, where none is given."""


CLIP_EPSILON = 1e-6
"""What torch adds to a norm before it divides by it."""


def optimizer_classes() -> dict[str, type[optim.Optimizer]]:
    """Return the optimizers of the installed torch that a run file may name."""
    found = inspect.getmembers(optim, inspect.isclass)
    legal = {name.lower(): kind for name, kind in found if issubclass(kind, optim.Optimizer)}
    return {name: kind for name, kind in legal.items() if name not in UNSUPPORTED}


def check_optimizer(name: str, fields: Mapping[str, Any]) -> None:
    """Refuse an unknown optimizer, an unknown field, or a value that the optimizer rejects."""
    kind = _optimizer_class(name)
    legal = list(inspect.signature(kind).parameters)[1:]
    for field in fields:
        if field not in legal:
            raise unknown_name(
                f"key in [optimizer] of '{name}'",
                field.replace("_", "-"),
                (each.replace("_", "-") for each in (*legal, *EXTRA_KEYS)),
                key="run-file.unknown-key",
            )
    make_optimizer(name, fields, [nn.Parameter(torch.zeros(2, 2))])


def make_optimizer(
    name: str, fields: Mapping[str, Any], parameters: Iterable[nn.Parameter]
) -> optim.Optimizer:
    """Return the optimizer `name` over `parameters`, which it updates in place.

    Where torch has a fused step for them on the CPU, it is taken, unless a field chooses another:
    the same rule up to rounding, in one pass over memory.
    """
    own = list(parameters)
    try:
        made = _optimizer_class(name)(
            own, **fields, **_fused_option(_optimizer_class(name), fields, own)
        )
    except (TypeError, ValueError, RuntimeError, LookupError, AssertionError) as error:
        raise ConfigError(
            "todo.key", f"[optimizer] '{name}' refuses {dict(fields)}: {error}"
        ) from error
    if made.defaults.get("fused"):
        made.register_step_pre_hook(_prepare_fused_step)
    return made


def _fused_option(
    optimizer_class: type[optim.Optimizer], fields: Mapping[str, Any], parameters: Sequence[Tensor]
) -> dict[str, Any]:
    """Return the field that asks for torch's fused step, where there is one and it is exact.

    In bfloat16 it rounds otherwise than the plain one; memory with gaps it reads as if it had none;
    with dampening it cannot begin a momentum beside others (`_prepare`).
    """
    legal = inspect.signature(optimizer_class).parameters
    fit = all(
        each.device.type == "cpu"
        and each.dtype in (torch.float32, torch.float64)
        and each.is_contiguous()
        for each in parameters
    )
    chosen = IMPLEMENTATION_FIELDS & {*fields} or fields.get("dampening")
    return {"fused": True} if fit and "fused" in legal and not chosen else {}


def _prepare_fused_step(optimizer: optim.Optimizer, *_: Any) -> None:
    """Lay gradients out as their parameters, since a fused step goes through both in one order.

    And give those that learn for the first time, beside others that have one, a momentum of zero:
    fused SGD wants all or none. Without dampening the first step from zero is that of torch.
    """
    for group in optimizer.param_groups:
        learning = [each for each in group["params"] if each.grad is not None]
        for each in learning:
            if not each.grad.is_contiguous():
                each.grad = torch.empty_like(each).copy_(each.grad)
        if not group.get("momentum"):
            continue
        new = [p for p in learning if optimizer.state[p].get("momentum_buffer") is None]
        if len(new) < len(learning):
            for each in new:
                optimizer.state[each]["momentum_buffer"] = torch.zeros_like(each)


def squared_norm(gradients: Sequence[Tensor]) -> float:
    """Return the sum of the squares of all elements, each tensor's made in float64.

    The tensors' sums are added in the order given: the same bits in every repetition on as many
    threads. Those of several blocks may be added for the norm of a whole model.
    """
    norms = (torch.linalg.vector_norm(each, dtype=torch.float64) for each in gradients)
    return sum((float(norm) ** 2 for norm in norms), 0.0)


def clip_by_norm_(gradients: Sequence[Tensor], norm: float, max_norm: float) -> None:
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
    scale = max_norm / (norm + CLIP_EPSILON)
    if math.isfinite(norm) and scale < 1:
        for gradient in gradients:
            gradient.mul_(scale)


def _optimizer_class(name: str) -> type[optim.Optimizer]:
    legal = optimizer_classes()
    kind = legal.get(name.replace("-", "").lower())
    if kind is None:
        raise unknown_name("optimizer", name, legal)
    return kind
