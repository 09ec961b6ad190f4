"""Weights of training samples: how often each is drawn, and how much it counts in the loss.

Invariant: weights are finite and at least 0, and at least one is above 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dtrain.data.array_source import ArraySource
from dtrain.data.dataset import SAMPLES_PER_READ, Dataset
from dtrain.data.hold_out import has_labels
from dtrain.data.sampler import DrawWeights
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import Task


class WeightedArrays(NamedTuple):
    """Data of a user with a weight per training sample.

    Attributes
    ----------
    data : sequence
        What a data function may return: (x_train, y_train, x_test, y_test), for example.
    weights : array
        A number per training sample, (n,), at least 0.
    """

    data: Any
    weights: Any


def check_weights(values: Any, size: int, location: str) -> NDArray[np.float64]:
    """Return weights as float64 (size,).

    Raises
    ------
    DataError
        They are no numbers, not one per sample, negative, not finite or all 0.
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "biuf" or array.shape != (size,):
        raise DataError(
            "data.weights-shape",
            f"{location} are of dtype {array.dtype} and shape {array.shape}: give one number per "
            f"training sample, of shape ({size},)",
        )
    weights = array.astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if wrong.size:
        raise DataError(
            "data.weights-invalid",
            f"{location}: that of sample {wrong[0]} is {weights[wrong[0]]}, one of {wrong.size} "
            "that are negative or not finite: give numbers of at least 0",
        )
    if not weights.any():
        raise DataError(
            "data.weights-all-zero", f"{location} are all 0: give at least one sample a weight"
        )
    return weights


def read_weights(source: ArraySource, size: int) -> NDArray[np.float64]:
    """Read the weights of all samples of a training split, and check them.

    Raises
    ------
    DataError
        As `check_weights`.
    """
    values = source.read_range(0, len(source)) if source.ndim else np.empty(())
    return check_weights(values, size, f"{source.location}: the weights of samples")


def make_draws(sampler: Any, train: Dataset, task: Task) -> DrawWeights | None:
    """Return how often training samples are drawn; None: each once per epoch.

    Parameters
    ----------
    sampler : str, callable or array
        "uniform"; "balanced": each class equally often; a function of the training targets (n, ...)
        that returns their weights (n,); or the weights, one per training sample before some are
        held out for validation.

    Raises
    ------
    ConfigError
        The targets are not of the kind that the sampler needs.
    DataError
        Weights are not legal.
    """
    if isinstance(sampler, str) and sampler == "uniform":
        return None
    everything = np.arange(train.size)
    if not isinstance(sampler, str) and not callable(sampler):
        given = check_weights(sampler, train.source_size, "the weights of [data] sampler")
        weights = given[train.source_indices(everything)]
        if train.size < train.source_size:  # those that are left may be all 0
            weights = check_weights(weights, train.size, "the weights of [data] sampler")
        return DrawWeights(weights, weights)
    check_sampler(sampler, train, task)
    targets = train.targets(everything).numpy()
    if not callable(sampler):
        counts = np.bincount(targets)
        return DrawWeights(1.0 / counts[targets], targets)
    weights = check_weights(sampler(targets), train.size, "the weights of [data] sampler")
    return DrawWeights(weights, weights)


def count_classes(train: Dataset, task: Task) -> NDArray[np.int64]:
    """Return how often each class occurs in the training labels, without ignored ones, (classes,).

    Targets that are no labels have counts of 0.
    """
    counts = np.zeros(train.classes, np.int64)
    if task.kind != "classes":
        return counts
    for start in range(0, train.size, SAMPLES_PER_READ):
        labels = train.targets(np.arange(start, min(start + SAMPLES_PER_READ, train.size)))
        flat = labels.numpy().ravel()
        counted = flat if task.ignore_index is None else flat[flat != task.ignore_index]
        counts += np.bincount(counted, minlength=train.classes)
    return counts


def check_sampler(sampler: Any, train: Dataset, task: Task) -> None:
    """Refuse a sampler, or the name of one, that does not fit the targets.

    Raises
    ------
    ConfigError
        "balanced" without one class label per sample, or a function of targets that are the inputs.
    """
    is_balanced = isinstance(sampler, str) and sampler == "balanced"
    if is_balanced and (not has_labels(train, task) or task.ignore_index is not None):
        raise ConfigError(
            "data.sampler-needs-labels",
            '[data] sampler = "balanced" needs one class label per sample, but the targets have '
            f"shape {train.target_shape} and dtype {train.target_dtype}: give a function or "
            "weights of your own, or leave sampler out",
        )
    is_function = callable(sampler) or (isinstance(sampler, str) and ":" in sampler)
    if is_function and task.target == "input":
        raise ConfigError(
            "data.sampler-needs-targets",
            '[data] sampler is a function of the targets, but with [task] target = "input" there '
            "are none: give the weights themselves in Python, or leave sampler out",
        )
