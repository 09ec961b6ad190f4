"""HDF5 files with `x` (N, C, H, W or N, ...), `y` (N,) and optional attributes of the file.

===========  ==========================================================================
attribute    meaning
===========  ==========================================================================
`classes`    the classes' names or their number; without it, the largest label plus one
`mean`       per channel, over the training split, in the units of `x` as stored
`std`        likewise; both are computed from the training file where one is absent
===========  ==========================================================================

Invariant: shape and targets are checked when a file is opened; images are read on first need. Files
are opened read-only and without locks, which parallel file systems often lack.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from dtrain.data.dataset import (
    SAMPLES_PER_READ,
    Array,
    Dataset,
    DatasetSplits,
    Label,
    Moments,
    check_arrays,
    check_splits,
    stores_integers,
    target_dtype,
    to_float_tensor,
    to_int_tensor,
    to_target_tensor,
    torch_dtype,
    value_range,
)
from dtrain.data.label_map import LabelNumbering
from dtrain.data.targets import TargetScan
from dtrain.errors import ConfigError, DataError, DtrainError
from dtrain.tasks.task import DEFAULT_TASK, Task


@final
@dataclass(frozen=True)
class Hdf5:
    """Two HDF5 files, one per split.

    Parameters
    ----------
    train, test : str
        Paths, relative to the run file's folder.

    Raises
    ------
    ConfigError
        A path is empty or no string.
    """

    train: str
    test: str

    def __post_init__(self) -> None:
        for key, value in (("train", self.train), ("test", self.test)):
            if not isinstance(value, str) or not value:
                raise ConfigError(
                    "data.path-invalid", f"[data] {key} = {value!r}: give the path of an HDF5 file"
                )

    def open(
        self, folder: Path, task: Task = DEFAULT_TASK, labels: LabelNumbering = "as-stored"
    ) -> DatasetSplits:
        """Open both files; no image is read.

        Raises
        ------
        DataError
            A file is missing or damaged, or the two do not fit each other.
        """
        train = Hdf5Dataset(folder / self.train, task=task, labels=labels)
        test = Hdf5Dataset(folder / self.test, train, task)
        return check_splits(DatasetSplits(train, test), f"{train.path} and {test.path}")


@final
class Hdf5Dataset(Dataset):
    """One split in one file: in memory where `fits_in_memory`, else read piece by piece.

    Parameters
    ----------
    path : Path
        The file.
    train : Hdf5Dataset, optional
        The training split, whose number of classes this one takes over.
    task : Task
        Decides which targets are legal.
    labels : "as-stored" or "compact"
        The numbers of the classes; those of `train` where it is given.

    Raises
    ------
    DataError
        The file is missing, damaged, or does not fit `train`.
    """

    def __init__(
        self,
        path: Path,
        train: Hdf5Dataset | None = None,
        task: Task = DEFAULT_TASK,
        labels: LabelNumbering = "as-stored",
    ) -> None:
        self.path, self.task = path, task
        with _open_file(path) as file:
            for key in ("x", "y") if task.target == "data" else ("x",):
                if not isinstance(file.get(key), h5py.Dataset):
                    raise DataError(
                        "data.hdf5-dataset-missing",
                        f"{path} has no HDF5 dataset '{key}', only {list(file)}: write x and y",
                    )
                _check_parts(file[key], path)
            x = file["x"]
            y = file["y"] if task.target == "data" else np.zeros(len(x), np.int64)
            train_scan: TargetScan | None = None if train is None else train._scan
            self._scan: TargetScan = TargetScan(y, str(path), task, labels, train_scan)
            check_arrays(x, y, str(path))
            self._y = self._scan_targets(y)
            self.size = len(x)
            self.shape = tuple(x.shape[1:])
            self._dtype = x.dtype
            self.input_dtype = torch_dtype(x.dtype)
            self._stored_names = _class_names(file)
            self.value_range = value_range(x.dtype)
            self._file_moments = _read_moments(file, self.shape[0], path)
        self.classes = self._count_classes(train)
        self.target_shape = self._scan.shape[1:]
        self.target_dtype = target_dtype(self._scan.dtype)
        self.class_labels = self._scan.class_labels
        self.class_names = _numbered_names(self._stored_names, self.class_labels)
        self._scan.check_classes(self.classes)

    def _scan_targets(self, y: Any) -> Array | None:
        """Check all targets; return them where they fit in memory."""
        if fits_in_memory(int(np.prod(y.shape)) * y.dtype.itemsize):
            in_memory = np.asarray(y[()])
            self._scan.add(in_memory)
            return in_memory
        for start in range(0, len(y), SAMPLES_PER_READ):
            self._scan.add(y[start : start + SAMPLES_PER_READ], start)
        return None

    def _count_classes(self, train: Hdf5Dataset | None) -> int:
        if train is None:
            has_names = self._scan.kind == "classes" and not self._scan.is_compact
            return (len(self._stored_names) if has_names else 0) or self._scan.count_outputs()
        own_names, names = self._stored_names, train._stored_names
        if names and own_names and own_names != names:
            raise DataError(
                "data.class-names-differ",
                f"{self.path} has the {len(own_names)} classes {_shorten(own_names)} and "
                f"{train.path} the {len(names)} classes {_shorten(names)}: import both from the "
                "same classes",
            )
        return train.classes

    @cached_property
    def slow(self) -> bool:
        """Whether the samples do not fit in memory; decided on first need."""
        return not fits_in_memory(self.size * int(np.prod(self.shape)) * self._dtype.itemsize)

    @cached_property
    def _rows(self) -> Any:
        """The samples: an array, or an HDF5 dataset whose file stays open."""
        if not self.slow:
            with _open_file(self.path) as file:
                return file["x"][()]
        return _open_unlocked(self.path)["x"]

    def inputs(self, indices: ArrayLike) -> Tensor:
        return to_float_tensor(self._read(lambda: self._rows, indices))

    def integer_inputs(self, indices: ArrayLike) -> Tensor:
        if not stores_integers(self.input_dtype):
            return super().integer_inputs(indices)  # an error
        return to_int_tensor(self._read(lambda: self._rows, indices))

    @cached_property
    def _targets(self) -> Any:
        """The targets: an array, or an HDF5 dataset whose file stays open."""
        return _open_unlocked(self.path)["y"] if self._y is None else self._y

    def _read(self, open_rows: Callable[[], Any], indices: ArrayLike) -> Array:
        """Return the stored samples or targets at `indices`."""
        order = np.asarray(indices)
        try:
            rows = open_rows()
            return rows[order] if isinstance(rows, np.ndarray) else _gather(rows, order)
        except (OSError, RuntimeError) as error:
            raise _read_error(self.path, error) from error

    def targets(self, indices: ArrayLike) -> Tensor:
        return to_target_tensor(self._scan.convert(self._read(lambda: self._targets, indices)))

    def moments(self) -> Moments:
        if self._file_moments is None:
            return super().moments()
        scale = 255.0 if self._dtype == np.uint8 else 1.0
        return self._file_moments[0] / scale, self._file_moments[1] / scale


@contextmanager
def _open_file(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading; a missing or damaged one raises `DataError`."""
    try:
        with _open_unlocked(path) as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise _read_error(path, error) from error


def _check_parts(rows: h5py.Dataset, path: Path) -> None:
    """Refuse a virtual data set whose parts are not all there: HDF5 reads fill values for them.

    Raises
    ------
    DataError
        It names the first file that is missing.
    """
    if not rows.is_virtual:
        return
    prefix = os.environ.get("HDF5_VDS_PREFIX", "").replace("${ORIGIN}", str(path.parent))
    names = dict.fromkeys(source.file_name for source in rows.virtual_sources())
    missing = [
        name
        for name in names
        if name != "." and "%" not in name  # this file; a pattern of many files
        if not any((folder / name).is_file() for folder in (Path(prefix), path.parent, Path()))
    ]
    if missing:
        raise DataError(
            "data.hdf5-part-missing",
            f"{path}: the virtual data set '{rows.name.lstrip('/')}' lacks {len(missing)} of "
            f"{len(names)} files, first {missing[0]}, and HDF5 would read zeros for them: restore "
            "the files, or make the virtual data set without them",
        )


def _gather(rows: h5py.Dataset, indices: Array) -> Array:
    """Read samples in the order of `indices`, those of one chunk as one slice.

    Reading 128 single rows takes a hundred times as long as one slice of 128.
    """
    result = np.empty((len(indices), *rows.shape[1:]), rows.dtype)
    order = np.argsort(indices, kind="stable")
    step = rows.chunks[0] if rows.chunks else 64
    breaks = np.flatnonzero(np.diff(indices[order] // step)) + 1
    for part in np.split(order, breaks) if len(order) else []:
        in_chunk = indices[part]
        low, high = int(in_chunk[0]), int(in_chunk[-1]) + 1
        result[part] = rows[low:high][in_chunk - low]
    return result


def _open_unlocked(path: Path) -> h5py.File:
    return h5py.File(path, "r", locking=False)


def _class_names(file: h5py.File) -> tuple[str, ...]:
    """Return the classes' names; numbers where the file has only their count, () without it."""
    names = np.asarray(file.attrs.get("classes", ()))
    if names.ndim == 0 and names.dtype.kind in "iu":
        return tuple(str(number) for number in range(int(names)))
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.flat)


def _numbered_names(names: tuple[str, ...], labels: tuple[Label, ...]) -> tuple[str, ...]:
    """Return the names of the classes that labels number, or all names where none is numbered."""
    if not labels:
        return names
    return tuple(
        names[label] if isinstance(label, int) and 0 <= label < len(names) else str(label)
        for label in labels
    )


def _read_moments(file: h5py.File, channels: int, path: Path) -> Moments | None:
    """Return the file's attributes `mean` and `std`, or None where one is absent."""
    if "mean" not in file.attrs or "std" not in file.attrs:
        return None
    mean, deviation = (np.asarray(file.attrs[key]) for key in ("mean", "std"))
    if any(
        statistic.shape != (channels,) or statistic.dtype.kind not in "iuf"
        for statistic in (mean, deviation)
    ):
        raise DataError(
            "data.statistics-shape",
            f"{path}: attributes mean and std have shapes {mean.shape} and "
            f"{deviation.shape}: give {channels} numbers each, one per channel",
        )
    mean, deviation = mean.astype(np.float64), deviation.astype(np.float64)
    if not np.isfinite([mean, deviation]).all() or (deviation < 0).any():
        raise DataError(
            "data.statistics-invalid",
            f"{path}: attributes mean = {mean} and std = {deviation} must be finite, and std not "
            "negative: delete both, and dtrain computes them",
        )
    return mean, deviation


def _shorten(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_error(path: Path, error: Exception) -> DtrainError:
    if not path.is_file():
        return DataError(
            "data.file-missing",
            f"{path} does not exist: correct the path, or make the file with 'dtrain data import'",
        )
    text = str(error).strip().splitlines()[0]
    return DataError(
        "data.file-damaged",
        f"{path} cannot be read as HDF5 ({path.stat().st_size} bytes): {text}; copy or "
        "import it again",
    )


MEMORY_FRACTION = 1 / 8


MAX_BYTES = 4 * 2**30


def fits_in_memory(size_bytes: int) -> bool:
    """Return whether `size_bytes` are at most an eighth of the available memory and 4 GiB.

    An eighth, because each rank of a host holds a copy of its own. At most 4 GiB, because batch
    systems may grant a job less memory than the host reports as available.
    """
    return size_bytes <= min(MEMORY_FRACTION * available_bytes(), MAX_BYTES)


def available_bytes() -> int:
    """Return the kernel's estimate of the available memory; without one, the host's memory."""
    table = Path("/proc/meminfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
