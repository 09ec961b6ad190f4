"""A tiny run, for laws that are tested on many variants of it: 50 samples, three classes.

Invariant: batches of 16 leave a last one of 2, so that no number of replicas or micro-batches up to
four divides everything.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dtrain.config.parse import parse_run
from dtrain.config.run import RunConfig
from dtrain.schedules import SCHEDULES
from dtrain.syncs import SYNCS

TABLE: dict[str, Any] = {
    "seed": 3,
    "epochs": 2,
    "batch-size": 16,
    "micro-batches": 3,
    "dtype": "float64",
    "threads": 1,
    "data": {"name": "tests.tiny:samples"},
    "model": {"name": "mlp", "widths": [13, 11, 7, 6]},
    "partition": {"blocks": 3},
    "objective": {"name": "mono-forward"},
    "optimizer": {"name": "adam", "lr": 0.01},
    "log": {"every-s": 1000},
}

PATTERNS = ("mono-forward", "backprop", "man", "f3", "dfa", "pepita", "forward-forward")
"""One objective for each pattern of routes, for laws that need not be tested on all."""

NEIGHBOURS = ("mono-forward", "backprop")
"""Objectives whose routes join neighbouring blocks only."""


def suited(schedule: str) -> list[str]:
    """Return the syncs that a schedule can run with."""
    asynchronous = SCHEDULES[schedule].asynchronous
    return [
        name
        for name, kind in SYNCS.items()
        if not (asynchronous and kind().traits().reparametrises)
    ]


def run(**changes: Any) -> RunConfig:
    """Return the tiny run; ``objective__name="backprop"`` changes a key of a table."""
    table = copy.deepcopy(TABLE)
    for name, value in changes.items():
        *sections, key = name.replace("_", "-").replace("--", ".").split(".")
        section = table
        for section_name in sections:
            section = section.setdefault(section_name, {})
        section[key] = value
        if value is None:
            del section[key]
    return parse_run(table, Path(__file__).parent / "tiny.toml")


def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 50 training and 17 test samples of 2 x 5 numbers around three centres."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 2, 5))
    y = random.integers(0, 3, 67)
    x = centres[y] + random.normal(size=(67, 2, 5))
    return x[:50], y[:50], x[50:], y[50:]


class Rebinding(nn.Linear):
    """A layer whose moving average is a buffer that every training forward rebinds."""

    def __init__(self) -> None:
        super().__init__(10, 12)
        self.register_buffer("seen", torch.zeros(10, dtype=torch.float64))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * input.detach().mean(0)
        return super().forward(input - self.seen)


class Noisy(nn.Linear):
    """A layer that uses random numbers, though its parent class never does."""

    def forward(self, input: Tensor) -> Tensor:
        sums = super().forward(input)
        return sums + 0.1 * torch.randn_like(sums) if self.training else sums


def rebinding() -> nn.Sequential:
    """Return a net with buffers that are rebound."""
    return nn.Sequential(nn.Flatten(), Rebinding(), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 3))


def noisy() -> nn.Sequential:
    """Return a net with random numbers in a subclass of a deterministic layer."""
    return nn.Sequential(nn.Flatten(), Noisy(10, 12), nn.ReLU(), Noisy(12, 8), nn.Linear(8, 3))


def writing() -> nn.Sequential:
    """Return a net in which blocks may start with layers that work in place."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(10, 12),
        nn.ReLU(inplace=True),
        nn.Linear(12, 8),
        nn.Hardtanh(inplace=True),
        nn.ELU(inplace=True),
        nn.Linear(8, 3),
    )


def normalised() -> nn.Sequential:
    """Return a net with batch statistics."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
    )


class Down(nn.Module):
    """A layer that returns float32."""

    def forward(self, input: Tensor) -> Tensor:
        return input.float()


class Up(nn.Module):
    """A layer that returns float64."""

    def forward(self, input: Tensor) -> Tensor:
        return input.double()


def converting() -> nn.Sequential:
    """Return a net whose blocks return another dtype than that of the weights."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(10, 12), Down(), Up(), nn.ReLU(), nn.Linear(12, 3), Down()
    )


def unseeded() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return other samples in each call."""
    random = np.random.default_rng()
    x, y = random.normal(size=(50, 10)), random.integers(0, 3, 50)
    return x, y, x, y


def dropping() -> nn.Sequential:
    """Return a net whose layers use random numbers while training."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(10, 12),
        nn.Dropout(0.3),
        nn.Linear(12, 8),
        nn.Sequential(nn.Tanh(), nn.Dropout(0.2)),
        nn.Linear(8, 3),
    )
