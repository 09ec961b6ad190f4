"""Weights foretold, and late gradients compensated: formulas over an optimizer's own state.

Invariant: nothing here changes the optimizer's state but `spiked`, which leaves it as the optimizer
itself would have; so checkpoints do not know of it.

With m the momentum, v the velocity (`momentum_buffer`), lr the present learning rate, T updates::

    velocity    w - lr T v                          SGD with momentum
    coasting    w - lr v (m - m^(T+1)) / (1 - m)    the same, without a further gradient
    difference  w + T (w - w of one update before)  any optimizer
    optimizer   T times the present step            SGD, Adam: m^ / (sqrt v^ + eps), AdamW: + decay

Sources: Kosson et al. 2021, "Pipelined Backpropagation at Scale", arXiv 2003.11666 (velocity,
difference, spikes); FTPipe's `msnag` (coasting); Guan et al. 2023, "PipeOptim", arXiv 2312.00839.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from dtrain.schedules.weight_policy import Prediction

ParameterState = Mapping[str, Any]


VELOCITY_PREDICTIONS = ("velocity", "coasting", "spectrain")
"""Predictions that need the velocity of SGD."""


def predict_weights(
    prediction: Prediction,
    optimizer: optim.Optimizer,
    steps: float,
    previous_weights: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Return copies of an optimizer's parameters, `steps` updates ahead.

    Parameters
    ----------
    before : sequence of Tensor, optional
        The parameters of one update before, for "difference".

    What has no state yet stays where it is.
    """
    found: list[Tensor] = []
    decoupled = isinstance(optimizer, optim.AdamW)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                moved = parameter.detach().clone()
                if prediction == "difference":
                    if previous_weights is not None:
                        moved.add_(moved - previous_weights[len(found)], alpha=steps)
                elif state:
                    decay = group["weight_decay"] if decoupled else 0.0
                    _extrapolate(prediction, moved, state, group, steps, decay)
                found.append(moved)
    return found


def _extrapolate(
    prediction: Prediction,
    weights: Tensor,
    state: ParameterState,
    group: Mapping[str, Any],
    steps: float,
    weight_decay: float,
) -> None:
    """Move a copy of a parameter by what its optimizer's state says; `decay` is apart from it."""
    lr = float(group["lr"])
    velocity = state.get("momentum_buffer")
    if velocity is not None:
        m = group["momentum"]
        far = steps if prediction != "coasting" else _geometric_sum(m, steps + 1) - 1
        weights.add_(velocity, alpha=-lr * far)
    elif "exp_avg" in state:
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        top = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        scale = (top / (1 - beta2**step)).sqrt_().add_(group["eps"])
        way = (state["exp_avg"] / (1 - beta1**step)).div_(scale)
        if weight_decay:
            way.add_(weights, alpha=weight_decay)
        weights.add_(way, alpha=-lr * steps * (-1 if group["maximize"] else 1))


def spike_compensated_step(optimizer: optim.Optimizer, delay: int) -> None:
    """Take a step of SGD whose gradients are `delay` updates late.

    w <- w - lr (a v + b g) with a = m^D and b = 1 + m + ... + m^(D-1): at once what a gradient that
    had come in time would have moved by now, and from now on the same. D = 1 is Nesterov's momentum
    in the form of torch.
    """
    if not delay:
        optimizer.step()
        return
    with torch.no_grad():
        for group in optimizer.param_groups:
            m, lr = group["momentum"], float(group["lr"])
            now, once = m**delay, _geometric_sum(m, delay)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["weight_decay"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                if m:
                    state = optimizer.state[parameter]
                    velocity = state.get("momentum_buffer")
                    if velocity is None:
                        velocity = state["momentum_buffer"] = gradient.clone()
                    else:
                        velocity.mul_(m).add_(gradient)
                    parameter.add_(velocity, alpha=-lr * now)
                parameter.add_(gradient, alpha=-lr * once)


def _geometric_sum(m: float, count: float) -> float:
    """Return 1 + m + ... + m^(count - 1)."""
    return count if m == 1 else (1 - m**count) / (1 - m)
