"""A run so small that laws can be tried on many of its kind: 50 samples, three classes.

Invariant: batches of 16 leave a last one of 2, so that no number of replicas or micro-batches up to
four divides everything.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dtrain.config import Run, parse

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


def run(**changes: Any) -> Run:
    """Return the tiny run; ``objective__name="backprop"`` changes a key of a table."""
    table = copy.deepcopy(TABLE)
    for name, value in changes.items():
        *outer, key = name.replace("_", "-").replace("--", ".").split(".")
        inner = table
        for each in outer:
            inner = inner.setdefault(each, {})
        inner[key] = value
        if value is None:
            del inner[key]
    return parse(table, Path(__file__).parent / "tiny.toml")


def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 50 training and 17 test samples of 2 x 5 numbers around three centres."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 2, 5))
    y = random.integers(0, 3, 67)
    x = centres[y] + random.normal(size=(67, 2, 5))
    return x[:50], y[:50], x[50:], y[50:]


def dropping() -> nn.Sequential:
    """Return a net whose layers draw random numbers while training."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(10, 12),
        nn.Dropout(0.3),
        nn.Linear(12, 8),
        nn.Sequential(nn.Tanh(), nn.Dropout(0.2)),
        nn.Linear(8, 3),
    )
