"""The data of a run as it trains on them, as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dtrain.config.run import RunConfig
from dtrain.data.conversion import Array
from dtrain.data.dataset import SAMPLES_PER_READ, Dataset
from dtrain.data.sampler import updates_per_epoch
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.statistics.standardise import Standardised, unstandardised
from dtrain.data.tools.file_description import count_not_finite, describe_targets
from dtrain.objectives.block_spec import BlockSpec
from dtrain.planning.layout import DTYPES
from dtrain.planning.plan import load_run
from dtrain.schedules.segments import TrainingLength
from dtrain.user_code import value_text

Table = dict[str, Any]


def describe_run_data(run: RunConfig, values: bool = False) -> Table:
    """Return splits, inputs, targets, order and memory of a run's data as plain values.

    Parameters
    ----------
    values : bool
        Read all samples, and count the numbers that are NaN or infinite.

    Raises
    ------
    DtrainError
        Data, model and task do not fit each other.
    """
    splits, _, spec = load_run(run)
    train, settings = splits.train, run.settings
    is_normalised = run.data.normalise and not spec.integer_samples
    updates = updates_per_epoch(train.size, settings.batch_size)
    length = TrainingLength.from_settings(
        updates,
        settings.epochs,
        settings.updates,
        settings.segment,
        run.checkpoint.every,
        run.evaluate.every_updates,
    )
    return {
        "run": str(run.path),
        "data": run.dataset.name,
        "splits": {
            name: _describe_split(split, spec, values) for name, split in splits.by_name().items()
        },
        "input": {
            "shape": list(train.shape),
            "dtype": _dtype_name(_input_dtype(run, train, spec)),
            "stored_dtype": _dtype_name(train.input_dtype),
        },
        "further_inputs": [
            {"shape": list(other.shape), "dtype": _dtype_name(other.dtype)}
            for other in train.other_inputs
        ],
        "target": {
            "kind": spec.task.kind,
            "shape": list(train.target_shape),
            "dtype": _dtype_name(train.target_dtype),
        },
        "classes": train.classes,
        "class_names": _class_names(train),
        "normalise": is_normalised,
        "statistics": _statistics_source(train) if is_normalised else None,
        "channels": _channels(run, train) if is_normalised else None,
        "shuffle": run.data.shuffle,
        "sampler": value_text(run.data.sampler),
        "augment": value_text(run.data.augment),
        "batch_size": settings.batch_size,
        "last_batch_size": (train.size - 1) % settings.batch_size + 1,
        "updates_per_epoch": updates,
        "updates": length.total_updates,
    }


def _describe_split(split: Dataset, spec: BlockSpec, values: bool) -> Table:
    stored = unstandardised(split)
    table: Table = {
        "samples": split.size,
        "bytes": split.size * int(np.prod(split.shape)) * stored.input_dtype.itemsize,
        "in_memory": not split.slow,
    }
    if spec.task.target == "data":
        classes = split.classes if spec.task.kind == "classes" else 0
        table["targets"] = describe_targets(_targets(split), classes)
    if values and (stored.input_dtype.is_floating_point or stored.input_dtype.is_complex):
        table["not_finite"] = count_not_finite(
            stored.inputs(rows).numpy() for rows in _rows(split.size, split.shape)
        )
    return table


def _targets(split: Dataset) -> Iterator[Array]:
    for rows in _rows(split.size, split.target_shape):
        yield split.targets(rows).numpy()


def _rows(size: int, shape: tuple[int, ...]) -> Iterator[Array]:
    """Yield the indices of a split, so many at a time that a read is of moderate size."""
    step = min(SAMPLES_PER_READ, max(1, 2**20 // max(1, int(np.prod(shape)))))
    for start in range(0, size, step):
        yield np.arange(start, min(start + step, size))


def _input_dtype(run: RunConfig, train: Dataset, spec: BlockSpec) -> torch.dtype:
    """Return the dtype of the samples that the model takes."""
    if spec.integer_samples:
        return torch.int64
    if train.input_dtype.is_complex:
        return train.input_dtype
    return DTYPES[run.settings.dtype]


def _statistics_source(train: Dataset) -> str:
    return "computed" if unstandardised(train).given_moments is None else "given"


def _channels(run: RunConfig, train: Dataset) -> str | int:
    """Return the axis of the channels, which is the last one of a series unless a key says
    otherwise."""
    axis = train.channel_axis if isinstance(train, Standardised) else 0
    is_last = axis == len(train.shape) - 1 > 0
    return "last" if run.data.channels == "first" and is_last else run.data.channels


def _class_names(train: Dataset) -> list[str] | None:
    stored = unstandardised(train)
    return list(stored.class_names) or None if isinstance(stored, SourceDataset) else None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
