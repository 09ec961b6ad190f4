"""Open a data set of `DATASETS`, or the one that a user's function returns.

Invariant: shape, size and classes are known as soon as a data set is open; images are read on
first need.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.data.dataset import DatasetSplits, check_splits, standardise
from dtrain.data.digits_set import Digits
from dtrain.data.hdf5_set import Hdf5, open_split
from dtrain.data.hold_out import hold_out
from dtrain.data.source_dataset import SourceDataset, make_split
from dtrain.data.user import as_splits
from dtrain.errors import ConfigError, unknown_name
from dtrain.tasks.task import DEFAULT_TASK, Task
from dtrain.user_code import PATTERN, bind_arguments, import_object

DATASETS: dict[str, type[Digits | Hdf5]] = {"digits": Digits, "hdf5": Hdf5}


DataTable = dict[str, Any]
"""A data set and its keys, as `dtrain.Run` takes it: the table of a run file."""


COMMON_KEYS = ("normalise", "shuffle", "augment", "validation")
"""Keys of `[data]` that every data set has."""


def digits(**keys: Any) -> DataTable:
    """Return the digits of scikit-learn: 1,437 and 360 samples of (1, 8, 8) in 10 classes.

    Parameters
    ----------
    keys
        Keys of `[data]`: `normalise`, `shuffle`, `augment`, `validation`.
    """
    return {"name": "digits", **keys}


def hdf5(train: str | Path, test: str | Path, **keys: Any) -> DataTable:
    """Return a data set of two HDF5 files with `x` (N, ...) and `y` (N, ...).

    Parameters
    ----------
    train, test : path
        Relative paths start in the folder of the script.
    keys
        Keys of `[data]`: `normalise`, `shuffle`, `augment`, `validation`.
    """
    return {"name": "hdf5", "train": str(train), "test": str(test), **keys}


def arrays(x_train: Any, y_train: Any, x_test: Any, y_test: Any, **keys: Any) -> DataTable:
    """Return a data set of four arrays or tensors, samples first, with keys of `[data]`.

    Samples of several inputs are a tuple or dict of arrays.
    """
    return {"name": (x_train, y_train, x_test, y_test), **keys}


def load_data(
    name: str,
    fields: Mapping[str, object],
    folder: Path,
    *,
    normalise: bool = True,
    task: Task = DEFAULT_TASK,
    validation: float | str = 0.0,
    seed: int = 0,
    target: Any = None,
) -> DatasetSplits:
    """Open the data set that a run file's `[data]` table names.

    Parameters
    ----------
    name : str
        A key of `DATASETS`, or `"package.module:function"`.
    fields : mapping
        The table's other keys, in snake_case, without `COMMON_KEYS`.
    folder : Path
        The run file's folder: paths are relative to it, and it is first on the import path.
    normalise : bool
        Standardise inputs per channel with the training split's statistics.
    task : Task
        Decides which targets are legal.
    validation : float or str
        Share of the training split that becomes the validation split, 0 for none; or the path of
        an HDF5 file beside those of data set "hdf5".
    seed : int
        Decides which samples a share takes.
    target : function, arrays or DatasetSplits, optional
        The data themselves, or the function that returns them, where they were given in Python.

    Raises
    ------
    ConfigError
        An unknown name or key.
    DataError
        The data are missing, damaged or do not fit each other.
    """
    splits = _open(name, fields, folder, task, target)
    if isinstance(validation, str):
        splits = _open_validation(name, splits, folder / validation, task)
    elif validation:
        splits = hold_out(splits, validation, seed, task)
    splits = standardise(splits) if normalise else splits
    return splits.with_input_targets() if task.target == "input" else splits


def _open_validation(name: str, splits: DatasetSplits, path: Path, task: Task) -> DatasetSplits:
    """Return the splits of HDF5 files with one more file for validation."""
    train = splits.train
    if name != "hdf5" or not isinstance(train, SourceDataset):
        raise ConfigError(
            "data.validation-path",
            f'[data] validation = "{path.name}" is a file, which only name = "hdf5" takes, not '
            f"'{name}': give a share of the training split, as 0.1",
        )
    validation = make_split(open_split(path, task), task, train)
    return check_splits(DatasetSplits(train, splits.test, validation), str(path))


def _open(
    name: str, fields: Mapping[str, object], folder: Path, task: Task, target: Any
) -> DatasetSplits:
    if ":" in name or target is not None:
        function = import_object(name, folder, "data") if target is None else target
        if not callable(function):
            return as_splits(function, "data", task)
        arguments = bind_arguments("[data]", function, fields, common_keys=COMMON_KEYS)
        return as_splits(function(**arguments), f"data '{name}'", task)
    if name not in DATASETS:
        raise unknown_name("data", name, [*DATASETS, PATTERN])
    kind = DATASETS[name]
    arguments = bind_arguments("[data]", kind, fields, common_keys=COMMON_KEYS)
    return kind(**arguments).open(folder, task)
