"""An independent simulator of late updates: one loop over micro-batches, and a history of weights.

Invariant: it knows no schedule, no cycle and no rank: that a block is D updates late means that its
update u was computed from version max(0, u - D), and that is all.

::

    for u:    x -> block 0 with w[u - D0] -> block 1 with w[u - D1] -> ... -> loss
              x <- block 0 with w[u]      <- block 1 with w[u]      <- ... <-'
              w[u + 1] = step(w[u], gradient)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

Weights = list[Tensor]


@dataclass
class Late:
    """What a run is told: how late blocks are, and what is done about it."""

    delays: Sequence[int]
    gaps: Sequence[int] = ()
    stash: bool = False
    lag: int | None = None
    prediction: str = "none"
    horizon: float = 1.0
    spikes: bool = False
    lr: float = 0.05
    momentum: float = 0.9
    decay: float = 0.0
    adam: bool = False
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class History:
    """One block's weights after each update, and what its optimizer remembered then."""

    modules: Sequence[nn.Module]
    weights: list[Weights]
    first: list[Weights] = field(default_factory=list)
    second: list[Weights] = field(default_factory=list)


def train(
    blocks: Sequence[Sequence[nn.Module]],
    updates: Sequence[Sequence[tuple[Tensor, Tensor]]],
    late: Late,
) -> list[Weights]:
    """Return the weights of each block after all updates, each a list of (x, labels)."""
    told = []
    for modules in blocks:
        start = [p.detach().clone() for m in modules for p in m.parameters()]
        zeros = [torch.zeros_like(each) for each in start]
        told.append(History(modules, [start], [zeros], [zeros]))
    for u, micros in enumerate(updates):
        rows = sum(len(labels) for _, labels in micros)
        sums = [[torch.zeros_like(each) for each in own.weights[0]] for own in told]
        for x, labels in micros:
            kept = []
            for b, own in enumerate(told):
                shown = _forward(own, late, b, u)
                x, inputs = run(own.modules, shown, x)
                kept.append((shown, inputs))
            scores = x.detach().requires_grad_()
            (loss_gradient,) = torch.autograd.grad(cross_entropy(scores, labels), scores)
            force = loss_gradient * (len(labels) / rows)
            for b in reversed(range(len(told))):
                shown, inputs = kept[b]
                weights = _backward(told[b], late, b, u, shown)
                force, gradients = back(told[b].modules, weights, inputs, force)
                sums[b] = [a + g for a, g in zip(sums[b], gradients, strict=True)]
        for b, own in enumerate(told):
            _step(own, late, min(u, late.delays[b]), sums[b], u)
    return [own.weights[-1] for own in told]


def _forward(own: History, late: Late, b: int, u: int) -> Weights:
    delay = min(u, late.delays[b])
    version = u - delay if late.lag is None else max(0, u - late.lag)
    far = late.horizon * (delay + (late.gaps[b] if late.prediction == "spectrain" else 0))
    return _foretold(own, late, version, far) if late.prediction != "none" else own.weights[version]


def _backward(own: History, late: Late, b: int, u: int, shown: Weights) -> Weights:
    if late.stash:
        return shown
    if late.prediction == "spectrain":
        return _foretold(own, late, u, late.horizon * late.gaps[b])
    return own.weights[u]


def _foretold(own: History, late: Late, version: int, far: float) -> Weights:
    now, m = own.weights[version], late.momentum
    if late.prediction == "difference":
        before = own.weights[max(0, version - 1)]
        return [w + far * (w - w0) for w, w0 in zip(now, before, strict=True)]
    if late.adam and version == 0:
        return now
    if late.adam:
        one, two = (1 - beta**version for beta in late.betas)
        pairs = zip(now, own.first[version], own.second[version], strict=True)
        return [w - far * late.lr * (a / one) / ((v / two).sqrt() + 1e-8) for w, a, v in pairs]
    if late.prediction == "coasting":
        far = (m - m ** (far + 1)) / (1 - m)
    return [w - late.lr * far * v for w, v in zip(now, own.first[version], strict=True)]


def _step(own: History, late: Late, delay: int, gradients: Weights, u: int) -> None:
    now = own.weights[-1]
    gradients = [g + late.decay * w for g, w in zip(gradients, now, strict=True)]
    if late.adam:
        one, two = late.betas
        first = [one * a + (1 - one) * g for a, g in zip(own.first[-1], gradients, strict=True)]
        second = [
            two * a + (1 - two) * g * g for a, g in zip(own.second[-1], gradients, strict=True)
        ]
        down = [(v / (1 - two ** (u + 1))).sqrt() + 1e-8 for v in second]
        steps = [a / (1 - one ** (u + 1)) / d for a, d in zip(first, down, strict=True)]
        own.second.append(second)
    else:
        first = [late.momentum * v + g for v, g in zip(own.first[-1], gradients, strict=True)]
        steps = first
        if late.spikes:
            a, b = late.momentum**delay, sum(late.momentum**j for j in range(delay))
            steps = [a * v + b * g for v, g in zip(first, gradients, strict=True)]
    own.first.append(first)
    own.weights.append([w - late.lr * s for w, s in zip(now, steps, strict=True)])


def run(modules: Sequence[nn.Module], weights: Weights, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return what modules make of x with these weights, and what each of them was given."""
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


Grads = Callable[[Tensor, Tensor], tuple[Tensor, Weights]]


def back(
    modules: Sequence[nn.Module], weights: Weights, inputs: Sequence[Tensor], force: Tensor
) -> tuple[Tensor, Weights]:
    """Return the gradient of x and those of the weights: with inputs as they were, and `weights`,
    whichever they are."""
    found: list[Weights] = []
    rest = list(weights)
    for module, x in zip(reversed(modules), reversed(inputs), strict=True):
        match module:
            case nn.Linear():
                _, weight = rest.pop(), rest.pop()
                found.append([force.T @ x, force.sum(0)])
                force = force @ weight
            case nn.Conv1d():
                _, weight = rest.pop(), rest.pop()
                grad, pads = torch.nn.grad, {"padding": module.padding}
                found.append(
                    [grad.conv1d_weight(x, weight.shape, force, **pads), force.sum((0, 2))]
                )
                force = grad.conv1d_input(x.shape, weight, force, **pads)
            case nn.GroupNorm():
                _, weight = rest.pop(), rest.pop()
                leaf = x.detach().requires_grad_()
                plain = functional.group_norm(leaf, module.num_groups)
                found.append([(force * plain.detach()).sum((0, 2)), force.sum((0, 2))])
                (force,) = torch.autograd.grad(plain, leaf, force * weight[None, :, None])
            case nn.ReLU():
                force = force * (x > 0)
            case nn.Flatten():
                force = force.view(x.shape)
    return force, [each for own in reversed(found) for each in own]
