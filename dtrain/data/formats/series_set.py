"""Series: windows over the steps of a table or an HDF5 array, and the steps behind each.

::

    steps      0 1 2 3 4 5 6 7 8 9         length = 3, horizon = 2, stride = 1 (default)
    sample 0   x x x y y
    sample 1     x x x y y

Invariant: a table is read as a whole when the set is opened; an HDF5 array is mapped where it lies
in one piece, else read on first need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

from dtrain.data.array_source import ArraySource, LazySource, MemorySource
from dtrain.data.conversion import Array
from dtrain.data.formats.csv_table import Columns, Layout, is_number, read_layout, read_table
from dtrain.data.formats.hdf5_steps import is_hdf5, open_steps
from dtrain.data.formats.window_set import StepArrays, WindowSet, check_steps
from dtrain.errors import ConfigError, DataError

Column = str | int


@final
@dataclass(frozen=True)
class Series(WindowSet):
    """Windows of a series (T, channels), and the next steps of some channels.

    Parameters
    ----------
    length : int
        Steps of a sample.
    stride : int, optional
        Steps from one window to the next, by default 1.
    horizon : int
        Steps of a target.
    features : optional
        Columns of the samples, by name or number. Default: all columns of numbers.
    target : optional
        Column of the targets, (horizon,), or a list of them, (horizon, columns). Default: those of
        the samples.
    delimiter : optional
        Of a table; default: as in `csv`.
    x : str
        Name of the series in an HDF5 file.
    """

    horizon: int = 1
    features: tuple[Column, ...] | None = None
    target: Column | tuple[Column, ...] | None = None
    delimiter: str | None = None
    x: str = "x"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(horizon=self.horizon)

    @property
    def target_steps(self) -> range:
        return range(self.length, self.length + self.horizon)

    @property
    def window_stride(self) -> int:
        return self.stride or 1

    def open_steps(self, paths: Sequence[Path], train: Sequence[Path]) -> dict[Path, StepArrays]:
        return {
            path: self._open_hdf5(path) if is_hdf5(path) else self._open_table(path)
            for path in dict.fromkeys(paths)
        }

    def _open_table(self, path: Path) -> StepArrays:
        layout = read_layout(path, self.delimiter, [*(self.features or ()), *self._targets])
        features = self._features(layout)
        targets = tuple(layout.position(name, "target") for name in self._targets) or features
        names = dict.fromkeys((*features, *targets))
        table = read_table(layout, Columns(tuple(names), ()), has_texts=False).features
        places = {column: place for place, column in enumerate(names)}

        def source(columns: Sequence[int]) -> Array:
            chosen = [places[column] for column in columns]
            return table if chosen == list(range(table.shape[1])) else table[:, chosen].copy()

        x = MemorySource(source(features), str(path))
        if targets == features and not self._is_single:
            return StepArrays(x, x)
        y = source(targets)
        return StepArrays(x, MemorySource(y[:, 0] if self._is_single else y, str(path)))

    @property
    def _is_single(self) -> bool:
        """Whether the target is one column and no list of them."""
        return isinstance(self.target, str | int)

    @property
    def _targets(self) -> tuple[Column, ...]:
        if self.target is None:
            return ()
        return self.target if isinstance(self.target, tuple) else (self.target,)

    def _features(self, layout: Layout) -> tuple[int, ...]:
        if self.features is not None:
            return tuple(layout.position(name, "features") for name in self.features)
        numbers = [i for i, field in enumerate(layout.first_row) if is_number(field)]
        if not numbers:
            raise DataError(
                "data.series-no-numbers", f"{layout.path} has no column of numbers: correct it"
            )
        return tuple(numbers)

    def _open_hdf5(self, path: Path) -> StepArrays:
        steps = open_steps(path, self.x)
        if steps.ndim != 2:
            raise DataError(
                "data.series-shape",
                f"{steps.location} has shape {steps.shape}: give (steps, channels)",
            )
        features = self._numbers(self.features, steps, "features")
        targets = self._numbers(self._targets or None, steps, "target") or features
        x = _choose(steps, features)
        if targets == features and not self._is_single:
            return StepArrays(x, x)
        return StepArrays(x, _choose(steps, targets, self._is_single))

    def _numbers(
        self, columns: Sequence[Column] | None, steps: ArraySource, key: str
    ) -> tuple[int, ...]:
        """Return the numbers of columns of an HDF5 array, () for all of them."""
        for column in columns or ():
            if not isinstance(column, int) or not -steps.shape[1] <= column < steps.shape[1]:
                raise ConfigError(
                    "data.no-column",
                    f"[data] {key} = {column!r}: {steps.location} has the columns 0 to "
                    f"{steps.shape[1] - 1}, which have no names",
                )
        return tuple(int(column) % steps.shape[1] for column in columns or ())


def _choose(steps: ArraySource, columns: tuple[int, ...], is_single: bool = False) -> ArraySource:
    """Return some columns of an array, all where none is named, (T,) if `is_single`."""
    if not columns:
        return steps
    shape = (len(steps),) if is_single else (len(steps), len(columns))
    load = partial(_read_columns, steps, columns, shape)
    return LazySource(shape, steps.dtype, load, steps.location)


def _read_columns(steps: ArraySource, columns: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    return steps.read_range(0, len(steps))[:, list(columns)].reshape(shape)
