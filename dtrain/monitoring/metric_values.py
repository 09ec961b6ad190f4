"""Metrics by the names that `[stop]`, `[checkpoint] best` and `[lr]` know them by.

===========================  =================================================================
name                         value
===========================  =================================================================
``train_loss``               mean loss of the last block over the current epoch
``test_loss``                loss on the test split; ``validation_loss`` likewise
``test_<metric>``            metric of the task on the test split; ``validation_<metric>`` likewise
``loss``, ``<metric>``       on the validation split where there is one, else on the test split
``ema_`` before any of them  of the averaged weights (not of ``train_loss``)
===========================  =================================================================

Invariant: values are totals over all ranks, so decisions that depend on them alone are the same on
all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain.errors import unknown_name
from dtrain.monitoring.run_totals import RunTotals
from dtrain.tasks.task import Task

SPLITS = ("test", "validation")


def rename_evaluation(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return an evaluation with `prefix` in its keys instead of "test"."""
    short = {key.removeprefix("test_"): value for key, value in metrics.items()}
    return {f"{prefix}_{key}": value for key, value in short.items()}


def metric_names(task: Task, has_validation: bool, has_ema: bool) -> list[str]:
    """Return the names that are legal in a run."""
    measured = list(dict.fromkeys(["loss", *task.metric_names]))
    if task.has_classes and "accuracy" not in measured:
        measured.append("accuracy")
    splits = SPLITS if has_validation else SPLITS[:1]
    names = [f"{split}_{name}" for split in splits for name in measured] + measured
    return ["train_loss", *names, *(f"ema_{name}" for name in names if has_ema)]


def check_metric_name(name: str, location: str, legal_names: list[str]) -> None:
    """Refuse a name that a run does not measure.

    Raises
    ------
    ConfigError
        It lists the legal names.
    """
    if name not in legal_names:
        raise unknown_name(location, name, legal_names, key="metric.unknown")


def metric_values(totals: RunTotals) -> dict[str, float | None]:
    """Return the values of the latest evaluation by name; None where one is not finite."""
    evaluated = rename_evaluation(totals.test, "test") | totals.evaluations
    values: dict[str, float | None] = {"train_loss": totals.train_loss}
    for weights in ("", "ema_"):
        for split in SPLITS:
            prefix = f"{weights}{split}_"
            if f"{prefix}loss" not in evaluated:
                continue
            measured = {key: evaluated[f"{prefix}{key}"] for key in ("loss", "accuracy")}
            measured |= evaluated[f"{prefix}metrics"]
            values |= {f"{prefix}{name}": value for name, value in measured.items()}
            values |= {f"{weights}{name}": value for name, value in measured.items()}
    return values


def higher_is_better(name: str, task: Task) -> bool:
    """Return whether a larger value of a metric is better."""
    for prefix in ("ema_", "test_", "validation_", "train_"):
        if name not in task.metric_names:
            name = name.removeprefix(prefix)
    return name != "loss" and task.higher_is_better(name)
