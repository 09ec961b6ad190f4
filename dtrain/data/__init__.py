"""Data: samples and labels of two splits, by a name of ours or by a user's function.

Invariant: shape, size and classes are known when a data set is open; images are read on first need.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dtrain.data.augment import AUGMENTS, Augment
from dtrain.data.dataset import ArrayDataset, Dataset, DatasetSplits, Standardised, standardise
from dtrain.data.digits import Digits
from dtrain.data.hdf5 import Hdf5
from dtrain.data.loader import Loader
from dtrain.data.sampler import SHUFFLES, epoch_order, even_ranges, updates_per_epoch
from dtrain.data.user import as_splits
from dtrain.errors import DtrainError, unknown_name
from dtrain.user_code import PATTERN, bind_arguments, import_object

__all__ = [
    "AUGMENTS",
    "DATASETS",
    "SHUFFLES",
    "ArrayDataset",
    "Augment",
    "Dataset",
    "DatasetSplits",
    "Digits",
    "Hdf5",
    "Loader",
    "Standardised",
    "epoch_order",
    "even_ranges",
    "load",
    "standardise",
    "updates_per_epoch",
]


DATASETS = {"digits": Digits, "hdf5": Hdf5}


COMMON_KEYS = ("normalise", "shuffle", "augment")
"""Keys of `[data]` that belong to no data set in particular."""


def load(
    name: str, fields: Mapping[str, object], folder: Path, *, normalise: bool = True
) -> DatasetSplits:
    """Return the data that a run file's `[data]` table asks for.

    Parameters
    ----------
    name : str
        A key of `DATA`, or `"package.module:function"`.
    fields : mapping
        The table's other keys, in snake_case, without the common ones (`normalise`, `shuffle`,
        `augment`).
    folder : Path
        The run file's folder: paths are relative to it, and it comes first on the import path.
    normalise : bool
        Standardise inputs per channel with the training split's statistics.

    Raises
    ------
    DtrainError
        Unknown names and keys; with code 3, whatever is wrong with the data.
    """
    data = _open(name, fields, folder)
    return standardise(data) if normalise else data


def _open(name: str, fields: Mapping[str, object], folder: Path) -> DatasetSplits:
    if ":" in name:
        function = import_object(name, folder, "data")
        return as_splits(
            function(**bind_arguments("[data]", function, fields, common_keys=COMMON_KEYS)),
            f"data '{name}'",
        )
    if name not in DATASETS:
        raise unknown_name("data", name, [*DATASETS, PATTERN])
    strategy: Digits | Hdf5 = DATASETS[name](
        **bind_arguments("[data]", DATASETS[name], fields, common_keys=COMMON_KEYS)
    )
    return strategy.open(folder)
