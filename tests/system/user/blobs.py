"""Data for tests of whole programs: ten clouds of points in the shape of small images.

It stands in for the digits of scikit-learn, whose import takes each rank more than a second.
"""

from __future__ import annotations

import numpy as np


def blobs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 1,437 training and 360 test samples (1, 8, 8) of ten classes."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 1, 8, 8))
    y = rng.integers(0, 10, 1797)
    x = (centres[y] + 0.5 * rng.normal(size=(1797, 1, 8, 8))).astype(np.float32)
    return x[:1437], y[:1437], x[1437:], y[1437:]
