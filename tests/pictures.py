"""A run on 22 images of 3 x 8 x 8, small enough to train networks for images in process."""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.config.run import RunConfig
from tests import tiny

RESNET: dict[str, Any] = {"name": "resnet", "depth": 8, "width": 4, "norm": "group", "groups": 2}


def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 22 training and 8 test images in three classes: a pattern per class, and noise."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 3, 8, 8))
    y = random.integers(0, 3, 30)
    x = centres[y] + random.normal(size=(30, 3, 8, 8))
    return x[:22], y[:22], x[22:], y[22:]


def run(**changes: Any) -> RunConfig:
    """Return the tiny run on these images: three blocks of a ResNet with DGL heads."""
    keys: dict[str, Any] = {
        "data__name": "tests.pictures:samples",
        "model": dict(RESNET),
        "objective": {"name": "local-head", "head": "dgl", "norm": "group", "groups": 2},
        "epochs": 1,
        "batch_size": 8,
        "micro_batches": 1,
    }
    return tiny.run(**(keys | changes))
