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
    path = folder / STATISTICS_FILE
    try:
        if path.is_symlink() or not path.is_file():  # a pipe would wait for its writer
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        lists, identity = [record["mean"], record["std"]], record["data"]
        is_whole = record["checksum"] == _checksum(lists)
        moments = from_lists(lists)
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
    channels = (training.dataset.shape[training.axis],)
    is_whole &= all(part.shape == channels and np.isfinite(part).all() for part in moments)
    if not is_whole or identity != data_identity(training.dataset, training.axis):
        return None
    return lists


def kept_text(training: TrainingStatistics) -> str:
    """Return the text of `STATISTICS_FILE` in a run folder; the moments must be known."""
    mean, deviation = to_lists(training.moments)
    record = {
        "mean": mean,
        "std": deviation,
        "checksum": _checksum([mean, deviation]),
        "data": data_identity(training.dataset, training.axis),
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def _checksum(lists: list[Any]) -> str:
    """Return a hash of the numbers: a changed one would train another model."""
    return blake2b(json.dumps(lists).encode(), digest_size=16).hexdigest()


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
