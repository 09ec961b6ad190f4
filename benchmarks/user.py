"""What the benchmarks' runs use as a user would: data out of a generator, layers that sleep.

Invariant: it stands beside the run file and knows nothing of benchmarks; equal arguments give
equal arrays on every rank.
"""

from __future__ import annotations

import time
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

Layers = list[tuple[str, Any]]


def noise(rows: int, width: int, classes: int = 10, tests: int = 64) -> tuple[Any, Any, Any, Any]:
    """Return normal inputs (rows, width) in float32 and labels in turn, for training and test."""
    drawn = np.random.default_rng(0)
    x = [drawn.standard_normal((count, width), dtype=np.float32) for count in (rows, tests)]
    y = [np.arange(count) % classes for count in (rows, tests)]
    return x[0], y[0], x[1], y[1]


def subset(train: str, test: str, rows: int, tests: int) -> tuple[Any, Any, Any, Any]:
    """Return samples and labels drawn from two HDF5 files, bytes as bytes.

    Drawn, since a file made of class folders holds one class after the other.
    """
    parts = []
    for path, count in ((train, rows), (test, tests)):
        with h5py.File(path, "r") as file:
            x, y = file["x"][:], file["y"][:]
        drawn = np.random.default_rng(0).permutation(len(y))[:count]
        parts += [x[drawn], y[drawn]]
    return parts[0], parts[1], parts[2], parts[3]


def deep(inputs: int, width: int, depth: int, classes: int) -> Layers:
    """Return a perceptron of residual units with LayerNorm, one layer each, a stem and a head."""
    units = [(f"unit{number}", lambda: Unit(width)) for number in range(depth)]
    return [
        ("stem", lambda: nn.Sequential(nn.Flatten(), nn.Linear(inputs, width))),
        *units,
        ("head", lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))),
    ]


class Unit(nn.Module):
    """Adds what one linear layer makes of its normalised input."""

    uses_rng = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + relu(linear(norm(x)))``."""
        return x + torch.relu(self.linear(self.norm(x)))


def sleepers(layers: int, width: int, forward_s: float, backward_s: float) -> Layers:
    """Return linear layers (width to width) that sleep as a device would compute."""
    return [
        (f"layer{number}", lambda: Sleeper(width, forward_s, backward_s))
        for number in range(layers)
    ]


class Sleeper(nn.Module):
    """A small linear layer, then a device that takes its time in both directions."""

    uses_rng = False

    def __init__(self, width: int, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.times = forward_s, backward_s

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear map of `x` after the forward's seconds."""
        y: Tensor = Sleep.apply(self.linear(x), *self.times)  # type: ignore[no-untyped-call]
        return y


class Sleep(torch.autograd.Function):
    """The identity, slowly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        """Sleep, then copy."""
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *told: Tensor) -> tuple[Tensor, None, None]:
        """Sleep, then pass the gradient on."""
        time.sleep(ctx.backward_s)
        return told[0].clone(), None, None
