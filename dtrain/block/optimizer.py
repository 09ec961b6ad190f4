"""The optimizers of `torch.optim` by name, and gradient clipping.

Invariant: one optimizer per block. An unknown name or field is an error before anything is built.
Clipping leaves finite gradients finite.
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
    """Scale learning rate and momentum from a reference batch size to another.

    m = m_r^(N / N_r), and lr = lr_r (1 - m) N / ((1 - m_r) N_r): per sample, a gradient decays as
    fast and moves the weights as far in total. Weight decay does not change.

    Source: Chiley et al. 2019, "Online Normalization for Training Neural Networks".

    >>> lr, momentum = scale_lr_and_momentum(0.1, 0.9, batch_size=1, reference_batch_size=128)
    >>> f"{lr:.4g} {momentum:.8f}"
    '6.428e-06 0.99917721'
    """
    ratio = batch_size / reference_batch_size
    scaled_momentum = momentum**ratio
    return lr * ratio * (1 - scaled_momentum) / (1 - momentum), scaled_momentum


UNSUPPORTED = {"lbfgs", "sparseadam", "optimizer"}
"""LBFGS evaluates its loss several times per step, SparseAdam needs sparse gradients."""


EXTRA_KEYS = ("clip", "clip_over", "scale_from")
"""Keys of [optimizer] that are not fields of torch's optimizers; see `ClipSection`."""


IMPLEMENTATION_FIELDS = {"fused", "foreach", "capturable", "differentiable"}
"""Fields that select torch's implementation; with any of them no other one is selected."""


DEFAULT_LR = 1e-3
"""Learning rate of torch's SGD, where none is given."""


CLIP_EPSILON = 1e-6
"""Added to the norm before a division by it, as torch does."""


def optimizer_classes() -> dict[str, type[optim.Optimizer]]:
    """Return the optimizers of the installed torch that a run file may name, in lower case."""
    return {
        name.lower(): member
        for name, member in inspect.getmembers(optim, inspect.isclass)
        if issubclass(member, optim.Optimizer) and name.lower() not in UNSUPPORTED
    }


def check_optimizer(name: str, fields: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an unknown optimizer or field, or a value that torch rejects."""
    legal_fields = list(inspect.signature(_optimizer_class(name)).parameters)[1:]
    for field in fields:
        if field not in legal_fields:
            raise unknown_name(
                f"key in [optimizer] of '{name}'",
                field.replace("_", "-"),
                (legal.replace("_", "-") for legal in (*legal_fields, *EXTRA_KEYS)),
                key="run-file.unknown-key",
            )
    make_optimizer(name, fields, [nn.Parameter(torch.zeros(2, 2))])


def make_optimizer(
    name: str, fields: Mapping[str, Any], parameters: Iterable[nn.Parameter]
) -> optim.Optimizer:
    """Return the optimizer `name` over `parameters`, which it updates in place.

    On the CPU it takes torch's fused step where there is one, unless a field selects another
    implementation: the same rule up to rounding, in one pass over memory.

    Raises
    ------
    ConfigError
        torch rejects a field.
    """
    trainable = list(parameters)
    optimizer_class = _optimizer_class(name)
    fused = _fused_option(optimizer_class, fields, trainable)
    try:
        optimizer = optimizer_class(trainable, **fields, **fused)
    except (TypeError, ValueError, RuntimeError, LookupError, AssertionError) as error:
        raise ConfigError(
            "optimizer.rejected", f"[optimizer] '{name}' rejects {dict(fields)}: {error}"
        ) from error
    if optimizer.defaults.get("fused"):
        optimizer.register_step_pre_hook(_prepare_fused_step)
    return optimizer


def _fused_option(
    optimizer_class: type[optim.Optimizer], fields: Mapping[str, Any], parameters: Sequence[Tensor]
) -> dict[str, Any]:
    """Return the field that selects torch's fused step, empty where it is missing or not exact.

    The fused step rounds differently in bfloat16, and ignores the strides of a tensor that is not
    contiguous. With dampening it cannot start a momentum beside others (`_prepare_fused_step`).
    """
    legal_fields = inspect.signature(optimizer_class).parameters
    exact = all(
        parameter.device.type == "cpu"
        and parameter.dtype in (torch.float32, torch.float64)
        and parameter.is_contiguous()
        for parameter in parameters
    )
    excluded = IMPLEMENTATION_FIELDS & {*fields} or fields.get("dampening")
    return {"fused": True} if exact and "fused" in legal_fields and not excluded else {}


def _prepare_fused_step(optimizer: optim.Optimizer, *_: Any) -> None:
    """Make gradients contiguous as their parameters are: a fused step reads both in one order.

    Where some parameters have a momentum, those that get their first gradient are given a momentum
    of zero, since fused SGD needs it for all or none. Without dampening the first step from zero
    is that of torch.
    """
    for group in optimizer.param_groups:
        reached = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in reached:
            if not parameter.grad.is_contiguous():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        if not group.get("momentum"):
            continue
        new = [p for p in reached if optimizer.state[p].get("momentum_buffer") is None]
        if len(new) < len(reached):
            for parameter in new:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def squared_norm(gradients: Sequence[Tensor]) -> float:
    """Return the sum of the squares of all elements, computed in float64.

    The sums of the tensors are added in the order given: the same bits in every repetition with the
    same number of threads. The norm of a model is the root of the sum over its blocks.
    """
    norms = (torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients)
    return sum((float(norm) ** 2 for norm in norms), 0.0)


def clip_by_norm_(gradients: Sequence[Tensor], norm: float, max_norm: float) -> None:
    """Multiply gradients by ``max_norm / (norm + 1e-6)`` in place, where that is less than 1.

    The rule of `torch.nn.utils.clip_grad_norm_`, up to rounding. A norm that is NaN or infinite
    leaves the gradients unchanged; the checks of losses and weights report the cause.

    Parameters
    ----------
    norm : float
        The L2 norm that is limited: ``squared_norm(gradients) ** 0.5``, or that of the model.
    max_norm : float
        The limit, more than 0.
    """
    scale = max_norm / (norm + CLIP_EPSILON)
    if math.isfinite(norm) and scale < 1:
        for gradient in gradients:
            gradient.mul_(scale)


def _optimizer_class(name: str) -> type[optim.Optimizer]:
    classes = optimizer_classes()
    optimizer_class = classes.get(name.replace("-", "").lower())
    if optimizer_class is None:
        raise unknown_name("optimizer", name, classes)
    return optimizer_class
