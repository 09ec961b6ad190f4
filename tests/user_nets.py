"""Nets of users with layers of their own, and blobs to train them on.

Made after reports of users of other tools: each was trained wrongly, or not at all, somewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dtrain.config.parse import parse_run
from dtrain.config.run import RunConfig
from dtrain.data.sampler import epoch_order

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def blobs() -> Arrays:
    """Return 96 training and 32 test samples of 8 numbers around four centres."""
    random = np.random.default_rng(0)
    y = random.integers(0, 4, 128)
    x = random.normal(size=(128, 8)) + y[:, None]
    return x[:96], y[:96], x[96:], y[96:]


def run(net: str, **tables: Any) -> RunConfig:
    """Return a run of three epochs; a table of `tables` is merged with that of the run."""
    table: dict[str, Any] = {
        "seed": 1,
        "epochs": 3,
        "batch-size": 32,
        "micro-batches": 2,
        "threads": 1,
        "dtype": "float64",
        "data": {"name": f"{__name__}:blobs"},
        "model": {"name": f"{__name__}:{net}"},
        "objective": {"name": "backprop"},
        "optimizer": {"name": "adamw", "lr": 0.01, "weight-decay": 0.1},
        "log": {"every-s": 1000},
    }
    for name, value in tables.items():
        key = name.replace("_", "-")
        old = table.get(key)
        table[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return parse_run(table, Path(__file__).parent / "user.toml")


class Spectral(nn.Module):
    """A filter in frequency space, with a complex parameter and a complex buffer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.randn(features // 2 + 1, dtype=torch.cfloat))
        self.register_buffer("phase", torch.full((features // 2 + 1,), 1j, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight * self.phase, n=self.features)


def complex_filter(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net whose first layer is complex."""
    width = shape[0]
    return nn.Sequential(Spectral(width), nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, classes))


class ComplexLinear(nn.Module):
    """A linear map of complex numbers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, dtype=torch.cfloat) / inputs)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Magnitude(nn.Module):
    """Absolute values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def complex_net(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net that takes complex numbers; its first cut is between complex layers."""
    width = shape[0]
    return nn.Sequential(
        ComplexLinear(width, 12), ComplexLinear(12, 12), Magnitude(), nn.Linear(12, classes)
    )


class Drop(nn.Module):
    """A residual unit that is skipped at random while training (LayerDrop)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.5:
            return x
        return x + torch.tanh(self.linear(x))


def layer_drop(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net of residual units that are skipped at random."""
    return nn.Sequential(*[Drop(shape[0]) for _ in range(5)], nn.Linear(shape[0], classes))


def python_drop(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net whose units are skipped by Python's own generator."""
    layers = [nn.Sequential(PythonDrop(shape[0])) for _ in range(5)]
    return nn.Sequential(*layers, nn.Linear(shape[0], classes))


class PythonDrop(Drop):
    """A residual unit that is skipped by a number of Python's global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.5 else x + torch.tanh(self.linear(x))


def numpy_initialised(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with initial weights of an unseeded generator of numpy."""
    net = nn.Sequential(nn.Linear(shape[0], 12), nn.ReLU(), nn.Linear(12, classes))
    generator = np.random.default_rng()
    with torch.no_grad():
        for parameter in net.parameters():
            values = generator.normal(scale=0.2, size=tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
    return net


def privately_initialised(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with initial weights of an unseeded generator of torch's."""
    net = nn.Sequential(nn.Linear(shape[0], 12), nn.ReLU(), nn.Linear(12, classes))
    generator = torch.Generator()
    generator.seed()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return net


class Unused(nn.Linear):
    """A linear layer with a parameter that its forward never uses."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def unused(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with a parameter that never gets a gradient."""
    return nn.Sequential(Unused(shape[0], 12), nn.ReLU(), nn.Linear(12, classes))


class PerClass(nn.Module):
    """A layer that adds a bias to rows with a positive first number; some batches have none."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        large = x[:, :1] > 2.0
        return x + large * self.bias if bool(large.any()) else x


def sometimes(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with a parameter that some micro-batches do not use."""
    return nn.Sequential(
        PerClass(shape[0]), nn.Linear(shape[0], 12), nn.ReLU(), nn.Linear(12, classes)
    )


def spectral(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with spectral norm, of the new kind and of the old one."""
    first = parametrizations.spectral_norm(nn.Linear(shape[0], 16))
    second = nn.utils.spectral_norm(nn.Linear(16, 16))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(16, classes))


def orthogonal(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with spectral norm of wide matrices whose singular values start equal."""
    layers: list[nn.Module] = []
    for inputs in (shape[0], 64):
        linear = nn.Linear(inputs, 64)
        nn.init.orthogonal_(linear.weight)
        layers += [parametrizations.spectral_norm(linear), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, classes))


class Centred(nn.Linear):
    """A layer with a buffer of signs that its author wants to be those of the first replica."""

    first_replica_buffers = ("signs",)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("signs", torch.ones(inputs))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.signs = torch.sign(input[0].detach())
        return super().forward(input)


def centred(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net with a user's buffer that has no mean."""
    return nn.Sequential(Centred(shape[0], 12), nn.ReLU(), nn.Linear(12, classes))


COMPILED_GRAPHS: list[int] = []
"""One entry for each graph that `compiled` has compiled."""


def counting_backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Run a graph as it is, and count it."""
    COMPILED_GRAPHS.append(len(inputs))
    return graph.forward


def uncompiled(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net of a linear layer, a normalised one and a head."""
    inner = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU())
    return nn.Sequential(nn.Linear(shape[0], 12), nn.ReLU(), inner, nn.Linear(12, classes))


def compiled(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return the same net, in which a layer and the inside of another one are compiled."""
    net = uncompiled(shape, classes)
    net[0] = torch.compile(net[0], backend=counting_backend)  # type: ignore[assignment]
    inner = net[2]
    assert isinstance(inner, nn.Sequential)
    inner[0] = torch.compile(inner[0], backend=counting_backend)  # type: ignore[assignment]
    return net


class Autocast(nn.Linear):
    """A linear layer that computes in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(input)


def autocast(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Return a net whose layers return bfloat16."""
    return nn.Sequential(Autocast(shape[0], 16), nn.ReLU(), Autocast(16, 16), Autocast(16, classes))


def train_plainly(
    net: nn.Module, optimizer: str, samples: np.ndarray | None = None, **fields: Any
) -> None:
    """Train a net for one epoch as `run` does without standardised inputs, in a plain loop."""
    for parameter in [*net.parameters(), *net.buffers()]:  # `double` would drop imaginary parts
        kind = torch.complex128 if parameter.is_complex() else torch.float64
        parameter.data = parameter.data.to(kind)
    order = epoch_order(96, 1, 0, "full")
    x, y, _, _ = blobs()
    x = x if samples is None else samples
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    rule = kinds[optimizer](net.parameters(), **fields)
    for start in range(0, 96, 32):
        rows = order[start : start + 32]
        rule.zero_grad()
        nn.functional.cross_entropy(
            net(torch.from_numpy(x[rows])), torch.from_numpy(y[rows])
        ).backward()
        rule.step()
