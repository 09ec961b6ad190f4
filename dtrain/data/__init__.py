"""Open a data set of `DATASETS`, or the one that a user's function returns.

Invariant: shape, size and classes are known as soon as a data set is open; images are read on
first need.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from dtrain.data.array_source import ArraySource
from dtrain.data.dataset import DatasetSplits
from dtrain.data.formats.csv_set import Csv, read_samples
from dtrain.data.formats.digits_set import Digits
from dtrain.data.formats.file_set import FileSet, Paths
from dtrain.data.formats.hdf5_set import Hdf5
from dtrain.data.formats.idx_set import Idx
from dtrain.data.formats.npz_set import Npz
from dtrain.data.formats.planetoid_set import Planetoid
from dtrain.data.formats.series_set import Series
from dtrain.data.formats.text_set import Text
from dtrain.data.formats.window_set import WindowSet
from dtrain.data.hold_out import hold_out
from dtrain.data.label_map import with_compact_labels
from dtrain.data.sample_weights import WeightedArrays
from dtrain.data.statistics.standardise import standardise
from dtrain.data.statistics.statistics_pass import Channels
from dtrain.data.torch_datasets import are_torch_datasets
from dtrain.data.user_data import as_splits
from dtrain.errors import ConfigError, unknown_name
from dtrain.schema import kebab, toml_text, unknown_key
from dtrain.tasks.task import DEFAULT_TASK, LabelNumbering, Task
from dtrain.user_code import PATTERN, bind_arguments, import_object

DATASETS: dict[str, type[Digits | FileSet | Planetoid]] = {
    "digits": Digits,
    "hdf5": Hdf5,
    "npz": Npz,
    "csv": Csv,
    "idx": Idx,
    "planetoid": Planetoid,
    "text": Text,
    "series": Series,
}


DataTable = dict[str, Any]
"""A data set and its keys, as `dtrain.Run` takes it: the table of a run file."""


AnyPath = str | PathLike[str]


TestFiles = AnyPath | Sequence[AnyPath] | float | None


COMMON_KEYS = (
    *("normalise", "channels", "shuffle", "augment", "validation"),
    *("labels", "sampler", "workers"),
)
"""Keys of `[data]` that every data set has."""


def digits(**keys: Any) -> DataTable:
    """Return the digits of scikit-learn: 1,437 and 360 samples of (1, 8, 8) in 10 classes.

    Parameters
    ----------
    keys
        Keys of `[data]`: `normalise`, `channels`, `shuffle`, `augment`, `validation`, `labels`.
    """
    return {"name": "digits", **keys}


def hdf5(train: AnyPath | Sequence[AnyPath], test: TestFiles = None, **keys: Any) -> DataTable:
    """Return a data set of HDF5 files.

    Parameters
    ----------
    train : path or sequence of paths
        Several files are one split. Relative paths start in the folder of the script.
    test : path, sequence of paths or float, optional
        Likewise; or the share of the training split that is held out for it. By default the
        training file holds the test split, too.
    keys
        Other keys of `[data]`, with underscores: `x`, `y`, `test_x`, `test_y`, `normalise`,
        `channels`, `shuffle`, `augment`, `validation`, `labels`.
    """
    return _file_set("hdf5", train, test, keys)


def npz(train: AnyPath | Sequence[AnyPath], test: TestFiles = None, **keys: Any) -> DataTable:
    """Return a data set of `.npz` files, or of `.npy` files with `train_y` and `test_y`.

    Parameters
    ----------
    train, test
        As in `hdf5`.
    keys
        Other keys of `[data]`, with underscores: `x`, `y`, `test_x`, `test_y`, `train_y`,
        `normalise`, `shuffle`, `augment`, `validation`, ...
    """
    return _file_set("npz", train, test, keys)


def csv(train: AnyPath | Sequence[AnyPath], test: TestFiles = None, **keys: Any) -> DataTable:
    """Return a data set of tables of comma-separated values.

    Parameters
    ----------
    train, test
        As in `hdf5`.
    keys
        Other keys of `[data]`, with underscores: `target`, `features`, `delimiter`, `normalise`,
        `channels`, `shuffle`, `augment`, `validation`, ...
    """
    return _file_set("csv", train, test, keys)


def idx(train: AnyPath | Sequence[AnyPath], test: TestFiles = None, **keys: Any) -> DataTable:
    """Return a data set of IDX files, as MNIST has them; `train` may be the folder of all four.

    Parameters
    ----------
    train, test
        As in `hdf5`.
    keys
        Other keys of `[data]`, with underscores: `train_y`, `test_y`, `normalise`, `shuffle`,
        `augment`, `validation`, ...
    """
    return _file_set("idx", train, test, keys)


def planetoid(file: AnyPath, **keys: Any) -> DataTable:
    """Return a citation graph of Planetoid, as `dtrain data import` wrote it.

    Parameters
    ----------
    file : path
        Relative paths start in the folder of the script.
    keys
        Other keys of `[data]`, with underscores: `scale_nodes`, `shuffle`, ...
    """
    return {"name": "planetoid", "file": str(file), **keys}


def text(train: AnyPath | Sequence[AnyPath], test: TestFiles = None, **keys: Any) -> DataTable:
    """Return a data set of windows of a text, with the next token of each of their tokens.

    Parameters
    ----------
    train, test
        Texts, or files of tokens by `dtrain data import`. A share is the end of the training text.
    keys
        Other keys of `[data]`, with underscores: `length`, `stride`, `tokens`, `shuffle`,
        `validation`, ...
    """
    return _file_set("text", train, test, keys)


def series(train: AnyPath | Sequence[AnyPath], test: TestFiles = None, **keys: Any) -> DataTable:
    """Return a data set of windows of a series, with the steps after each.

    Parameters
    ----------
    train, test
        Tables or HDF5 files. A share is the end of the training series.
    keys
        Other keys of `[data]`, with underscores: `length`, `horizon`, `stride`, `features`,
        `target`, `normalise`, `shuffle`, `validation`, ...
    """
    return _file_set("series", train, test, keys)


def _file_set(
    name: str, train: AnyPath | Sequence[AnyPath], test: TestFiles, keys: Mapping[str, Any]
) -> DataTable:
    """Return the table of a data set in files, with paths as texts."""
    values = {"train": train, "test": test, **keys}
    return {"name": name} | {k: _as_text(v) for k, v in values.items() if v is not None}


def _as_text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return str(value) if isinstance(value, PathLike) else value


def arrays(
    x_train: Any, y_train: Any, x_test: Any, y_test: Any, *, weights: Any = None, **keys: Any
) -> DataTable:
    """Return a data set of four arrays or tensors, samples first, with keys of `[data]`.

    Samples of several inputs are a tuple or dict of arrays. `weights` has a number per training
    sample, by which its loss counts.
    """
    data = x_train, y_train, x_test, y_test
    return {"name": data if weights is None else WeightedArrays(data, weights), **keys}


def datasets(
    train: Any,
    test: Any,
    validation: Any = None,
    classes: int | None = None,
    workers: int = 0,
    **keys: Any,
) -> DataTable:
    """Return a data set of map-style `torch.utils.data.Dataset`, which are read by index.

    Parameters
    ----------
    train, test : Dataset
        Their items are (sample, target); a sample of several inputs is a tuple or dict.
    validation : Dataset or float, optional
        A third Dataset, or the share of the training samples that is held out.
    classes : int, optional
        Number of classes. Without it, a Dataset that has no list `targets` or `labels` is read once
        at the start.
    workers : int
        Processes per rank that read items; 0: a thread.
    keys
        Keys of `[data]`: `normalise`, `shuffle`, `augment`.
    """
    is_share = validation is None or isinstance(validation, int | float)
    table: DataTable = {"name": (train, test) if is_share else (train, test, validation)}
    given = {"validation": validation if is_share else None, "classes": classes}
    table |= {key: value for key, value in given.items() if value is not None}
    return {**table, "workers": workers, **keys}


def load_data(
    name: str,
    fields: Mapping[str, object],
    folder: Path,
    *,
    normalise: bool = True,
    channels: Channels = "first",
    task: Task = DEFAULT_TASK,
    validation: float | Paths = 0.0,
    labels: LabelNumbering = "as-stored",
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
    channels : "first", "last" or int
        The axis of a sample that holds the channels.
    task : Task
        Decides which targets are legal.
    validation : float, str or tuple of str
        Share of the training split that becomes the validation split, 0 for none; or the files of
        one, for a data set in files.
    labels : "as-stored" or "compact"
        The number of a class: its label, or the place of its label among the sorted distinct ones
        of the training split, before a part of it is held out.
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
    task = task.with_labels(labels)
    kind = None if target is not None else DATASETS.get(name)
    holds_windows = kind is not None and issubclass(kind, WindowSet)
    share = 0.0 if isinstance(validation, str | tuple) else float(validation)
    given = None if not validation or (share and not holds_windows) else validation
    splits = _open(name, fields, folder, task, target, given)
    if labels == "compact":
        splits = with_compact_labels(splits, task, f"data '{name}'")
    if share and not holds_windows:
        splits = hold_out(splits, share, seed, task)
    axis = "last" if kind is Series and channels == "first" else channels  # steps are first
    splits = standardise(splits, axis) if normalise else splits
    return splits.with_input_targets() if task.target == "input" else splits


def _open(
    name: str,
    fields: Mapping[str, object],
    folder: Path,
    task: Task,
    target: Any,
    validation: Paths | float | None,
) -> DatasetSplits:
    """Return the splits; `validation` are files for the validation split, or the share of it for
    windows."""
    kind = None if ":" in name or target is not None else DATASETS.get(name)
    if kind is not None and issubclass(kind, FileSet):
        files = kind(**bind_arguments("[data]", kind, fields, common_keys=COMMON_KEYS))
        if isinstance(files, WindowSet):
            return files.open(folder, task, validation)
        assert not isinstance(validation, float)
        return files.open(folder, task, validation)
    if validation is not None:
        sets = [name for name, kind in DATASETS.items() if issubclass(kind, FileSet)]
        raise ConfigError(
            "data.validation-path",
            f"[data] validation = {toml_text(validation)} is a file, which only the data sets "
            f"{', '.join(sets)} take, not '{name}': give a share of the training split, as 0.1",
        )
    if ":" in name or target is not None:
        function = import_object(name, folder, "data") if target is None else target
        if not callable(function):
            return as_splits(function, "data", task, _number_of_classes(function, fields))
        arguments = bind_arguments("[data]", function, fields, common_keys=COMMON_KEYS)
        return as_splits(function(**arguments), f"data '{name}'", task)
    if kind is None:
        raise unknown_name("data", name, [*DATASETS, PATTERN])
    return kind(**bind_arguments("[data]", kind, fields, common_keys=COMMON_KEYS)).open(
        folder, task
    )


def _number_of_classes(value: Any, fields: Mapping[str, object]) -> int | None:
    """Return the number of classes that was given with torch Datasets; refuse other keys."""
    value = value.data if isinstance(value, WeightedArrays) else value
    for key in fields:
        if key != "classes" or not are_torch_datasets(value):
            raise unknown_key("in [data]", kebab(key), COMMON_KEYS)
    classes = fields.get("classes")
    if classes is None or (isinstance(classes, int) and classes > 0):
        return classes
    raise ConfigError(
        "data.classes-invalid", f"[data] classes = {classes!r}: give the number of classes"
    )


def open_samples(
    path: Path, name: str, fields: Mapping[str, object], folder: Path, task: Task
) -> tuple[ArraySource, ...]:
    """Open a file of samples without targets, for the data set that a run file's `[data]` names.

    Parameters
    ----------
    path : Path
        The file; its format follows from its name.
    name, fields, folder, task
        As in `load_data`. A file of the set's own format has the names of the test split.

    Raises
    ------
    DataError
        The file is damaged, or lacks the samples.
    """
    kind = _file_kind(path)
    own = DATASETS.get(name)
    if own is not None and issubclass(own, WindowSet):
        kind = own
    if own is kind:
        files = kind(**bind_arguments("[data]", kind, fields, common_keys=COMMON_KEYS))
        return files.open_samples(path, folder, task)
    return read_samples(path) if kind is Csv else kind(str(path)).open_samples(path, folder, task)


def _file_kind(path: Path) -> type[FileSet]:
    """Return the format of a file by its name; HDF5 where the name does not say it."""
    suffixes = path.name.lower().removesuffix(".gz").split(".")[1:]
    kinds: dict[str, type[FileSet]] = {"npy": Npz, "npz": Npz, "csv": Csv, "tsv": Csv}
    if path.is_dir() or re.search(r"idx\d", path.name):
        return Idx
    return kinds.get(suffixes[-1], Hdf5) if suffixes else Hdf5
