"""`dtrain plan` of thousands of ranks takes seconds and little memory."""

from __future__ import annotations

import resource
import time

import pytest

from dtrain.planning.plan import make_plan
from dtrain.planning.report import plan_text
from tests import tiny
from tests.single import one_thread  # noqa: F401


@pytest.mark.parametrize(
    ("objective", "schedule"),
    [("backprop", "1f1b"), ("local-head", "stream")],
)
def test_60_layers_on_4096_ranks(objective: str, schedule: str) -> None:
    """Loose bounds, in seconds of the processor: some 2 s and 100 MB were measured."""
    run = tiny.run(
        model={"name": "mlp", "widths": [64] * 59},
        batch_size=1024,
        partition={"blocks": 60},
        mesh__stages=32,
        objective__name=objective,
        schedule__name=schedule,
    )
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = plan_text(make_plan(run, 4096))
    assert "4,096 ranks = 128 replicas x 32 stages" in text
    assert time.process_time() - start < 12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 600_000  # in KB
