"""The contents of a file of samples: arrays, labels and statistics, as plain values.

Invariant: arrays are read piece by piece, and nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.formats.hdf5_pieces import open_for_pieces, read_pieces
from dtrain.data.formats.text_set import BYTE_NAMES, TOKENS, open_bytes
from dtrain.data.importing.array_stream import ArrayStream, StreamedSplit, name_text
from dtrain.data.importing.import_data import NO_OPTIONS, ImportOptions, open_arrays
from dtrain.data.importing.numpy_stream import npz_arrays, stream_npy
from dtrain.data.importing.text_stream import is_text
from dtrain.errors import DataError

MAX_VALUES = 100_000
"""More different labels are not counted one by one."""


TEXT_BYTES = 1 << 24
"""Bytes of a text that are counted at once."""


HDF5_SUFFIXES = (".h5", ".hdf5")


Table = dict[str, Any]


def describe_file(path: Path, options: ImportOptions = NO_OPTIONS, values: bool = False) -> Table:
    """Return the contents of a file of HDF5, numpy, IDX or text as plain values.

    Parameters
    ----------
    options : ImportOptions
        Names of samples and targets, as in an import.
    values : bool
        Read all arrays, and count the numbers that are NaN or infinite.

    Raises
    ------
    DataError
        The file is missing or damaged, or of another format.
    """
    if path.exists() and path.suffix not in HDF5_SUFFIXES and not h5py.is_hdf5(path):
        return _describe_arrays(path, options, values)
    with open_for_pieces(path) as file:
        datasets = _datasets(file)
        labels = options.y or (TOKENS if TOKENS in datasets and "y" not in datasets else "y")
        table: Table = {"file": str(path), "file_bytes": path.stat().st_size}
        table["arrays"] = [_describe_dataset(name, rows, values) for name, rows in datasets.items()]
        table["class_names"] = _class_names(file)
        table["targets"] = {}
        if labels in datasets and _is_numeric(datasets[labels].dtype):
            table["targets"][labels] = describe_targets(
                read_pieces(datasets[labels]), len(table["class_names"] or ())
            )
        table["statistics"] = _statistics(file)
        return table


def describe_targets(pieces: Iterable[Array], classes: int = 0) -> Table:
    """Return the range of targets and, where they are integers, how often each one occurs.

    Parameters
    ----------
    classes : int
        Number of classes, 0 where unknown: then the labels from the smallest to the largest.
    """
    counts: Counter[int] | None = Counter()
    smallest, largest, kind = np.inf, -np.inf, "integers"
    for piece in pieces:
        if piece.dtype.kind == "c" or not piece.size:
            continue
        numbers, repeats = np.unique(piece, return_counts=True)
        if piece.dtype.kind == "f":
            kind, counts, numbers = "real numbers", None, numbers[np.isfinite(numbers)]
        if len(numbers):
            smallest, largest = min(smallest, numbers[0]), max(largest, numbers[-1])
        if counts is not None:
            for number, repeat in zip(numbers.tolist(), repeats.tolist(), strict=True):
                counts[int(number)] += repeat
            counts = counts if len(counts) <= MAX_VALUES else None
    is_known = smallest <= largest
    return {
        "kind": kind,
        "smallest": _plain(smallest) if is_known else None,
        "largest": _plain(largest) if is_known else None,
        "counts": None if counts is None else {str(n): counts[n] for n in sorted(counts)},
        "classes_without_samples": [] if counts is None else _gaps(counts, classes),
    }


def count_not_finite(pieces: Iterable[Array]) -> Table:
    """Return the numbers of NaN and of infinite values, and the first sample that has one."""
    table: Table = {"nan": 0, "infinite": 0, "first_sample": None}
    start = 0
    for piece in pieces:
        if piece.dtype.kind in "fc":
            is_wrong = ~np.isfinite(piece)
            nans = int(np.count_nonzero(np.isnan(piece)))
            table["nan"] += nans
            table["infinite"] += int(np.count_nonzero(is_wrong)) - nans
            if table["first_sample"] is None and is_wrong.any():
                table["first_sample"] = start + int(np.argwhere(is_wrong)[0, 0])
        start += len(piece)
    return table


def _gaps(counts: Counter[int], classes: int) -> list[int]:
    """Return the classes that no sample has."""
    if classes:
        labels = range(classes)
    else:
        labels = range(min(counts, default=0), max(counts, default=-1) + 1)
    if len(labels) > MAX_VALUES:
        return []
    return [label for label in labels if label not in counts]


def _datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Return the datasets of a file by name, those of groups too."""
    datasets: dict[str, h5py.Dataset] = {}

    def add(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            datasets[name] = item

    file.visititems(add)
    return datasets


def _describe_dataset(name: str, rows: h5py.Dataset, values: bool) -> Table:
    table = _describe_array(name, rows.shape, rows.dtype)
    table |= {
        "chunks": list(rows.chunks) if rows.chunks else None,
        "compression": rows.compression,
        "virtual": bool(rows.is_virtual),
        "stored_bytes": int(rows.id.get_storage_size()),
    }
    if values and rows.shape and _is_numeric(rows.dtype):
        table["not_finite"] = count_not_finite(read_pieces(rows, name))
    return table


def _describe_array(name: str, shape: tuple[int, ...] | None, dtype: np.dtype[Any]) -> Table:
    count = int(np.prod(shape, dtype=np.int64)) if shape is not None else 0
    return {
        "name": name,
        "shape": list(shape or ()),
        "dtype": "text" if dtype.hasobject else str(dtype),
        "bytes": count * dtype.itemsize,
    }


def _class_names(file: h5py.File) -> list[str] | None:
    names = np.asarray(file.attrs.get("classes", ()))
    if names.ndim == 0:
        return [str(number) for number in range(int(names))] if names.dtype.kind in "iu" else None
    return [name_text(name) for name in names.flat] or None


def _statistics(file: h5py.File) -> Table | None:
    if "mean" not in file.attrs or "std" not in file.attrs:
        return None
    values = {key: np.ravel(file.attrs[key]).astype(float) for key in ("mean", "std")}
    return {
        key: [number if np.isfinite(number) else None for number in numbers.tolist()]
        for key, numbers in values.items()
    }


def _describe_arrays(path: Path, options: ImportOptions, values: bool) -> Table:
    """Return the contents of a file of another format than HDF5."""
    table: Table = {"file": str(path), "class_names": None, "targets": {}, "statistics": None}
    if path.is_file():
        table["file_bytes"] = path.stat().st_size
    if is_text(path):
        return table | _describe_text(path)
    arrays, splits = _open_arrays(path, options)
    table["arrays"] = [
        _describe_array(name, array.shape, array.dtype)
        | ({"not_finite": count_not_finite(array.pieces())} if _counts(array, values) else {})
        for name, array in arrays.items()
    ]
    for split in splits:
        if split.y.dtype.kind in "biufc" and split.y.shape:
            targets = describe_targets(split.y.pieces(), len(split.classes))
            table["targets"][f"y of {split.name}"] = targets
            table["class_names"] = list(split.classes) or table["class_names"]
    return table


def _describe_text(path: Path) -> Table:
    """Describe the bytes of a text, as a run reads it by default."""
    source = open_bytes(path)
    pieces = (source.read_range(i, i + TEXT_BYTES) for i in range(0, len(source), TEXT_BYTES))
    return {
        "arrays": [_describe_array("bytes", source.shape, source.dtype)],
        "class_names": list(BYTE_NAMES),
        "targets": {"bytes": describe_targets(pieces)},
    }


def _open_arrays(
    path: Path, options: ImportOptions
) -> tuple[dict[str, ArrayStream], list[StreamedSplit]]:
    """Return the arrays of a file by name, and the splits that an import would make of them."""
    try:
        splits = open_arrays(path, options)
    except DataError as error:
        if error.key not in ("import.array-missing", "import.targets-missing"):
            raise
        splits = []
    if splits is None:
        raise DataError(
            "data.describe-format",
            f"{path} is of no format that can be described: import it first by 'dtrain data "
            f"import {path} OUT.h5'",
        )
    if path.suffix == ".npz":
        return npz_arrays(path), splits
    if path.suffix == ".npy" and not splits:
        return {path.stem: stream_npy(path)}, splits
    named = {f"{key} of {split.name}": getattr(split, key) for split in splits for key in "xy"}
    return named, splits


def _counts(array: ArrayStream, values: bool) -> bool:
    return values and bool(array.shape) and _is_numeric(array.dtype)


def _is_numeric(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biufc"


def _plain(number: Any) -> int | float:
    return int(number) if float(number).is_integer() else float(number)
