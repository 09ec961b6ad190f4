"""Statistics of a training split that a run folder keeps, and what identifies their data.

Invariant: kept statistics are used for the data alone of which they were computed, as far as size,
shape, dtype, axis of the channels and a hash of some samples tell, and bit for bit.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.dataset import Dataset, Moments
from dtrain.data.statistics.standardise import TrainingStatistics

STATISTICS_FILE = "data-statistics.json"
"""The file of a run folder."""


HASHED_SAMPLES = 64


MAX_HASHED_BYTES = 2**24
"""Bytes of samples that the hash covers, unless one sample is larger."""


def data_identity(dataset: Dataset, axis: int) -> dict[str, Any]:
    """Return what identifies a split and the channels of its statistics, as JSON has it."""
    first = dataset.inputs([0]).numpy()
    count = min(HASHED_SAMPLES, max(1, MAX_HASHED_BYTES // first.nbytes))
    indices = np.unique(np.linspace(0, dataset.size - 1, count).astype(np.int64))
    samples = blake2b(dataset.inputs(indices).numpy().tobytes(), digest_size=16)
    return {
        "samples": dataset.size,
        "shape": list(dataset.shape),
        "dtype": str(dataset.input_dtype).removeprefix("torch."),
        "channel_axis": axis,
        "hash_of_samples": samples.hexdigest(),
    }


def read_kept(folder: Path, training: TrainingStatistics) -> list[Any] | None:
    """Return kept moments as `to_lists` writes them; None where the folder has none of these data.

    Some samples are read where there is a file.
    """
    try:
        record = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
        is_complete = isinstance(record, dict) and {"mean", "std", "data"} <= record.keys()
    except (OSError, ValueError):
        return None
    if not is_complete or record["data"] != data_identity(training.dataset, training.axis):
        return None
    return [record["mean"], record["std"]]


def kept_text(training: TrainingStatistics) -> str:
    """Return the text of `STATISTICS_FILE` in a run folder; the moments must be known."""
    mean, deviation = to_lists(training.moments)
    record = {
        "mean": mean,
        "std": deviation,
        "data": data_identity(training.dataset, training.axis),
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def to_lists(moments: Moments) -> list[Any]:
    """Return mean and deviation as lists of numbers, complex ones as pairs; no bit is lost."""
    mean, deviation = moments
    pairs = np.stack([mean.real, mean.imag], axis=1) if mean.dtype.kind == "c" else mean
    return [pairs.tolist(), deviation.tolist()]


def from_lists(lists: list[Any]) -> Moments:
    """Return the moments of `to_lists`."""
    mean, deviation = (np.asarray(numbers, np.float64) for numbers in lists)
    if mean.ndim == 2:
        return mean[:, 0] + 1j * mean[:, 1], deviation
    return mean, deviation
