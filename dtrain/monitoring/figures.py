"""Figures of a segment: speed, share of the machine's peak, and the spread over the ranks.

Invariant: figures are computed from the records of the ranks and from the plan; no rank measures
them during an update.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.planning.plan import Plan
from dtrain.tasks.task import Task

FLOPS_PER_MULTIPLY_ADD = 2

SPREAD_KEYS = ("step_s", "wait_s", "memory_bytes")
"""Keys of the spreads in a `train` record and in `summary.json`."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return smallest value, median and largest value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def rank_figures(records: Sequence[Mapping[str, Any]], updates: int) -> dict[str, Any]:
    """Return the spreads over the ranks of one segment, and the peak of all ranks.

    Seconds are those of an update. The peak of a rank is the median of all ranks, which one rank
    that was disturbed does not change.
    """
    count = max(updates, 1)
    peak = statistics.median(record["peak_flops"] for record in records) * len(records)
    return {
        "step_s": spread([record["wall_s"] / count for record in records]),
        "wait_s": spread([(record["wall_s"] - record["busy_s"]) / count for record in records]),
        "memory_bytes": spread([record["memory_bytes"] for record in records]),
        "peak_tflops": peak / 1e12,
    }


def positions_per_sample(task: Task) -> int | None:
    """Return the number of classified positions of a sample, None where the sample has one."""
    shape = task.target_spec.shape
    if not (task.has_classes and task.has_positions):
        return None
    if task.kind == "classes":
        return math.prod(shape)
    return math.prod(shape[:-1] if task.classes_last else shape[1:])


def speed_figures(plan: Plan, samples_per_s: float, latest: Mapping[str, Any]) -> dict[str, Any]:
    """Return positions and operations per second, and their share of the measured peak.

    Parameters
    ----------
    samples_per_s : float
        Samples per second of all ranks.
    latest : mapping
        The latest segment of `RunTotals`; empty before the first one.
    """
    positions = positions_per_sample(plan.layout.task)
    multiply_adds = sum(block.cost for block in plan.layout.block_layouts)
    tflops = FLOPS_PER_MULTIPLY_ADD * multiply_adds * samples_per_s / 1e12
    peak = latest.get("peak_tflops")
    return {
        "tokens_per_s": None if positions is None else positions * samples_per_s,
        "tflops": tflops,
        "peak_share": tflops / peak if peak else None,
    }
