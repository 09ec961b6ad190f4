"""Weight prediction and spike compensation: formulas over an optimizer's own state.

Invariant: predictions do not change the optimizer's state, and `spike_compensated_step` leaves it
as the optimizer itself would. So checkpoints hold no state of either.

With m the momentum, v the velocity (`momentum_buffer`), lr the present learning rate, T updates::

    velocity    w - lr T v                          SGD with momentum
    coasting    w - lr v (m - m^(T+1)) / (1 - m)    the same, without further gradients
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

from dtrain.block.complex_tensors import real_view
from dtrain.schedules.weight_policy import Prediction

ParameterState = Mapping[str, Any]


VELOCITY_PREDICTIONS = ("velocity", "coasting", "spectrain")
"""Predictions that need SGD with momentum."""


def predict_weights(
    prediction: Prediction,
    optimizer: optim.Optimizer,
    parameters: Sequence[Tensor],
    steps: float,
    previous_weights: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Return copies of an optimizer's parameters as predicted for `steps` updates later.

    Parameters without optimizer state are not moved.

    Parameters
    ----------
    parameters : sequence of Tensor
        The parameters, in the order of the result.
    previous_weights : sequence of Tensor, optional
        The parameters before the last update, for "difference".
    """
    predicted: list[Tensor] = []
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for parameter in parameters:
            state, group = optimizer.state.get(parameter, {}), groups[id(parameter)]
            weights = parameter.detach().clone()
            if prediction == "difference":
                if previous_weights is not None:
                    weights.add_(weights - previous_weights[len(predicted)], alpha=steps)
            elif state:
                decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, optim.AdamW))
                decay = group["weight_decay"] if decoupled else 0.0
                _extrapolate(prediction, weights, state, group, steps, decay)
            predicted.append(weights)
    return predicted


def _extrapolate(
    prediction: Prediction,
    weights: Tensor,
    state: ParameterState,
    group: Mapping[str, Any],
    steps: float,
    weight_decay: float,
) -> None:
    """Move a copy of a parameter along its optimizer's state, and along decoupled weight decay."""
    lr = float(group["lr"])
    weights = real_view(weights)
    state = {
        key: real_view(torch.as_tensor(value)) for key, value in state.items() if value is not None
    }
    velocity = state.get("momentum_buffer")
    if velocity is not None:
        momentum = group["momentum"]
        distance = steps if prediction != "coasting" else _geometric_sum(momentum, steps + 1) - 1
        weights.add_(velocity, alpha=-lr * distance)
    elif "exp_avg" in state:
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        second_moment = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        scale = (second_moment / (1 - beta2**step)).sqrt_().add_(group["eps"])
        direction = (state["exp_avg"] / (1 - beta1**step)).div_(scale)
        if weight_decay:
            direction.add_(weights, alpha=weight_decay)
        weights.add_(direction, alpha=-lr * steps * (-1 if group["maximize"] else 1))


def spike_compensated_step(optimizer: optim.Optimizer, delay: int) -> None:
    """Take a step of SGD whose gradients are `delay` updates late (D).

    w <- w - lr (a v + b g) with a = m^D and b = 1 + m + ... + m^(D-1). The step makes up at once
    for the movement that a gradient without delay would have caused by now; later steps are the
    same. D = 1 is Nesterov's momentum in the form of torch.
    """
    if not delay:
        optimizer.step()
        return
    with torch.no_grad():
        for group in optimizer.param_groups:
            momentum, lr = group["momentum"], float(group["lr"])
            velocity_factor, gradient_factor = momentum**delay, _geometric_sum(momentum, delay)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["weight_decay"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                if momentum:
                    state = optimizer.state[parameter]
                    velocity = state.get("momentum_buffer")
                    if velocity is None:
                        velocity = state["momentum_buffer"] = gradient.clone()
                    else:
                        velocity.mul_(momentum).add_(gradient)
                    parameter.add_(velocity, alpha=-lr * velocity_factor)
                parameter.add_(gradient, alpha=-lr * gradient_factor)


def _geometric_sum(ratio: float, count: float) -> float:
    """Return 1 + ratio + ... + ratio^(count - 1)."""
    return count if ratio == 1 else (1 - ratio**count) / (1 - ratio)
