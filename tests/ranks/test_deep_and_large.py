"""Nets of many layers in as many blocks, and sizes above 2^31 bytes in plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtrain.planning import report
from dtrain.planning.plan import make_plan
from tests import tiny
from tests.harness import train_in_threads

DEPTH = 60
ROWS, WIDTH = 30_000, 24_000


def samples() -> tuple[np.ndarray, ...]:
    """Return samples of one update of the wide net, and few for the test."""
    x = np.zeros((ROWS + 4, 4), dtype="float32")
    y = np.arange(ROWS + 4) % 3
    return x[:-4], y[:-4], x[-4:], y[-4:]


@pytest.mark.parametrize(
    ("objective", "schedule"), [("mono-forward", "stream"), ("backprop", "pipelined")]
)
def test_sixty_layers_in_sixty_blocks_train_the_same_on_few_ranks(
    objective: str, schedule: str, tmp_path: Path
) -> None:
    run = tiny.run(
        model={"name": "mlp", "widths": [6] * (DEPTH - 1)},
        partition={"blocks": DEPTH},
        objective={"name": objective},
        schedule={"name": schedule},
        micro_batches=1,
        epochs=1,
    )
    alone, apart = (train_in_threads(run, tmp_path / str(stages), stages) for stages in (1, 3))
    assert alone["blocks"] == DEPTH
    assert alone["digest"] == apart["digest"]


def test_a_plan_counts_messages_and_parameters_above_2_to_the_31() -> None:
    """Nothing of that size is allocated."""
    run = tiny.run(
        data={"name": "tests.ranks.test_deep_and_large:samples"},
        model={"name": "mlp", "widths": [WIDTH, WIDTH]},
        partition={"blocks": 3},
        mesh={"stages": 3},
        objective={"name": "backprop"},
        dtype="float32",
        batch_size=ROWS,
        micro_batches=1,
        epochs=1,
    )
    table = report.plan_table(make_plan(run, 3))
    sizes = {row["bytes"] for row in table["messages"]}
    assert sizes == {ROWS * WIDTH * 4}
    assert ROWS * WIDTH * 4 > 2**31
    parameters = [row["parameters_bytes"] for row in table["memory"]]
    assert parameters[1] == 4 * (WIDTH * WIDTH + WIDTH) > 2**31
