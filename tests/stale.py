"""An independent simulator of delayed gradients: a loop over updates with a history of weights.

Invariant: it knows no schedule, cycle or rank. A block is D updates late if its update u was
computed from version max(0, u - D), and nothing else.

::

    for u:    x -> block 0 with w[u - D0] -> block 1 with w[u - D1] -> ... -> loss
              x <- block 0 with w[u]      <- block 1 with w[u]      <- ... <-'
              w[u + 1] = step(w[u], gradient)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy
from torch.nn.grad import conv1d_input, conv1d_weight

Weights = list[Tensor]


@dataclass
class DelayedTraining:
    """Delays of the blocks, their mitigation and the optimizer."""

    delays: Sequence[int]
    gaps: Sequence[int] = ()
    stash: bool = False
    replay: bool = False
    lag: int | None = None
    prediction: str = "none"
    horizon: float = 1.0
    spike_compensation: bool = False
    lr: float = 0.05
    momentum: float = 0.9
    decay: float = 0.0
    adam: bool = False
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class History:
    """One block's weights and optimizer state after each update."""

    modules: Sequence[nn.Module]
    weights: list[Weights]
    first_moments: list[Weights] = field(default_factory=list)
    second_moments: list[Weights] = field(default_factory=list)


def train(
    blocks: Sequence[Sequence[nn.Module]],
    updates: Sequence[Sequence[tuple[Tensor, Tensor]]],
    settings: DelayedTraining,
) -> list[Weights]:
    """Return the weights of each block after all updates; an update is a list of (x, labels)."""
    histories = []
    for modules in blocks:
        start = [p.detach().clone() for m in modules for p in m.parameters()]
        zeros = [torch.zeros_like(weight) for weight in start]
        histories.append(History(modules, [start], [zeros], [zeros]))
    for u, micro_batches in enumerate(updates):
        rows = sum(len(labels) for _, labels in micro_batches)
        sums = [[torch.zeros_like(w) for w in history.weights[0]] for history in histories]
        for x, labels in micro_batches:
            forwards = []
            for b, history in enumerate(histories):
                weights = _forward_weights(history, settings, b, u)
                x, inputs = run_modules(history.modules, weights, x)
                forwards.append((weights, inputs))
            scores = x.detach().requires_grad_()
            (loss_gradient,) = torch.autograd.grad(cross_entropy(scores, labels), scores)
            cotangent = loss_gradient * (len(labels) / rows)
            for b in reversed(range(len(histories))):
                forward_weights, inputs = forwards[b]
                weights = _backward_weights(histories[b], settings, b, u, forward_weights)
                if settings.replay:
                    _, inputs = run_modules(histories[b].modules, weights, inputs[0])
                cotangent, gradients = backward(histories[b].modules, weights, inputs, cotangent)
                sums[b] = [total + g for total, g in zip(sums[b], gradients, strict=True)]
        for b, history in enumerate(histories):
            _step(history, settings, min(u, settings.delays[b]), sums[b], u)
    return [history.weights[-1] for history in histories]


def _forward_weights(history: History, settings: DelayedTraining, b: int, u: int) -> Weights:
    delay = min(u, settings.delays[b])
    version = u - delay if settings.lag is None else max(0, u - settings.lag)
    gap = settings.gaps[b] if settings.prediction == "spectrain" else 0
    if settings.prediction == "none":
        return history.weights[version]
    return _predict(history, settings, version, settings.horizon * (delay + gap))


def _backward_weights(
    history: History, settings: DelayedTraining, b: int, u: int, forward_weights: Weights
) -> Weights:
    if settings.stash:
        return forward_weights
    if settings.prediction == "spectrain":
        return _predict(history, settings, u, settings.horizon * settings.gaps[b])
    return history.weights[u]


def _predict(history: History, settings: DelayedTraining, version: int, steps: float) -> Weights:
    weights, m = history.weights[version], settings.momentum
    if settings.prediction == "difference":
        before = history.weights[max(0, version - 1)]
        return [w + steps * (w - w0) for w, w0 in zip(weights, before, strict=True)]
    if settings.adam and version == 0:
        return weights
    moments = history.first_moments[version]
    if settings.adam:
        one, two = (1 - beta**version for beta in settings.betas)
        triples = zip(weights, moments, history.second_moments[version], strict=True)
        return [
            w - steps * settings.lr * (a / one) / ((v / two).sqrt() + 1e-8) for w, a, v in triples
        ]
    if settings.prediction == "coasting":
        steps = (m - m ** (steps + 1)) / (1 - m)
    return [w - settings.lr * steps * v for w, v in zip(weights, moments, strict=True)]


def _step(
    history: History, settings: DelayedTraining, delay: int, gradients: Weights, u: int
) -> None:
    weights, moments = history.weights[-1], history.first_moments[-1]
    gradients = [g + settings.decay * w for g, w in zip(gradients, weights, strict=True)]
    if settings.adam:
        one, two = settings.betas
        first = [one * a + (1 - one) * g for a, g in zip(moments, gradients, strict=True)]
        second = [
            two * a + (1 - two) * g * g
            for a, g in zip(history.second_moments[-1], gradients, strict=True)
        ]
        scales = [(v / (1 - two ** (u + 1))).sqrt() + 1e-8 for v in second]
        steps = [a / (1 - one ** (u + 1)) / scale for a, scale in zip(first, scales, strict=True)]
        history.second_moments.append(second)
    else:
        first = [settings.momentum * v + g for v, g in zip(moments, gradients, strict=True)]
        steps = first
        if settings.spike_compensation:
            a, b = settings.momentum**delay, sum(settings.momentum**j for j in range(delay))
            steps = [a * v + b * g for v, g in zip(first, gradients, strict=True)]
    history.first_moments.append(first)
    history.weights.append([w - settings.lr * s for w, s in zip(weights, steps, strict=True)])


def run_modules(
    modules: Sequence[nn.Module], weights: Weights, x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the output of modules with these weights, and the input of each module."""
    inputs, rest = [], list(weights)
    for module in modules:
        inputs.append(x)
        match module:
            case nn.Linear():
                x = functional.linear(x, rest.pop(0), rest.pop(0))
            case nn.Conv1d():
                x = functional.conv1d(x, rest.pop(0), rest.pop(0), padding=module.padding)
            case nn.GroupNorm():
                x = functional.group_norm(x, module.num_groups, rest.pop(0), rest.pop(0))
            case nn.ReLU():
                x = x.clamp(min=0)
            case nn.Flatten():
                x = x.flatten(1)
    return x.detach(), inputs


def backward(
    modules: Sequence[nn.Module], weights: Weights, inputs: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, Weights]:
    """Return the gradients of x and of the weights, with the inputs of the forward.

    `weights` may differ from those of the forward.
    """
    gradients: list[Weights] = []
    rest = list(weights)
    for module, x in zip(reversed(modules), reversed(inputs), strict=True):
        match module:
            case nn.Linear():
                _, weight = rest.pop(), rest.pop()
                gradients.append([cotangent.T @ x, cotangent.sum(0)])
                cotangent = cotangent @ weight
            case nn.Conv1d():
                _, weight = rest.pop(), rest.pop()
                padding = {"padding": module.padding}
                weight_gradient = conv1d_weight(x, weight.shape, cotangent, **padding)
                gradients.append([weight_gradient, cotangent.sum((0, 2))])
                cotangent = conv1d_input(x.shape, weight, cotangent, **padding)
            case nn.GroupNorm():
                _, weight = rest.pop(), rest.pop()
                leaf = x.detach().requires_grad_()
                normalised = functional.group_norm(leaf, module.num_groups)
                weight_gradient = (cotangent * normalised.detach()).sum((0, 2))
                gradients.append([weight_gradient, cotangent.sum((0, 2))])
                (cotangent,) = torch.autograd.grad(
                    normalised, leaf, cotangent * weight[None, :, None]
                )
            case nn.ReLU():
                cotangent = cotangent * (x > 0)
            case nn.Flatten():
                cotangent = cotangent.view(x.shape)
    return cotangent, [gradient for module in reversed(gradients) for gradient in module]
