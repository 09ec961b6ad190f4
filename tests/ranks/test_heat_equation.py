"""Regression on fields: a U-Net with a skip learns the heat equation, cut in three."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.harness import train_in_threads


@pytest.mark.parametrize(("objective", "bound"), [("backprop", 0.98), ("local-head", 0.95)])
def test_a_surrogate_of_the_heat_equation_is_learnt(
    objective: str, bound: float, tmp_path: Path
) -> None:
    run = tiny.run(
        epochs=6,
        batch_size=32,
        micro_batches=1,
        dtype="float32",
        data={"name": "tests.heat_equation:fields"},
        model={"name": "tests.heat_equation:UNet"},
        task={"loss": "mse", "metrics": ["r2", "mae"]},
        partition={"cuts": ["down", "up"]},
        objective={"name": objective},
        optimizer={"name": "adam", "lr": 3e-3},
        lr={"name": "cosine"},
    )
    summary = train_in_threads(run, tmp_path, stages=3)
    assert summary["metrics"]["r2"] >= bound
