"""Plans of thousands of ranks take seconds and little memory."""

from __future__ import annotations

import random
import resource
import time

import pytest

from dtrain.partition import balanced_cuts, imbalance, layer_ranges
from dtrain.planning.plan import make_plan
from dtrain.planning.report import plan_text
from dtrain.schedules import SCHEDULES
from dtrain.schedules.verify import verify_schedule
from tests import tiny
from tests.plan.test_schedules import backprop, local
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


@pytest.mark.parametrize("name", SCHEDULES)
def test_large_meshes_are_checked_in_time(name: str) -> None:
    """64 stages within two seconds; fewer stages in a quadratically smaller time."""
    stages = 48 if name == "1f1b" else 32
    routes = local(stages) if name.startswith("stream") else backprop(stages)
    micros = 1 if SCHEDULES[name].delays_count_micro_batches else stages
    micro_batches = [[micros] * 390 + [micros - (replica > 20)] for replica in range(64)]
    start = time.process_time()
    verify_schedule(SCHEDULES[name](), range(stages), micro_batches, routes)
    assert time.process_time() - start < 2 * (stages / 64) ** 2


def test_hundreds_of_layers_take_a_second() -> None:
    generator = random.Random(0)
    ends = [0]
    for _ in range(600):
        ends.append(ends[-1] + generator.randint(1, 1000))
    start = time.process_time()
    cuts = balanced_cuts(600, 16, lambda i, j: ends[j] - ends[i])
    assert time.process_time() - start < 3
    assert imbalance([ends[r.stop] - ends[r.start] for r in layer_ranges(600, cuts)]) < 1.05
