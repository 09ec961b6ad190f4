"""Data sets of windows over the steps of a text or a series.

Shares that are held out are the last steps, in the order training, validation, test, so that no
window of one split overlaps one of another::

    all files, one after another   |  training            |  validation  |  test  |
                                                    validation = 0.2      test = 0.1

Invariant: a window lies in one file and in one split.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dtrain.data.array_source import ArraySource
from dtrain.data.dataset import DatasetSplits
from dtrain.data.formats.file_set import (
    FileSet,
    Paths,
    SplitFiles,
    combine,
    no_test_split,
)
from dtrain.data.formats.window_source import WindowSource
from dtrain.data.source_dataset import SplitSources, make_splits
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import DEFAULT_TASK, Task


class StepArrays(NamedTuple):
    """The steps of one file.

    Attributes
    ----------
    inputs, targets : ArraySource
        What a sample and its target are windows of, (T,) or (T, channels); of equal length.
    class_names : tuple of str
        Names of the classes of a target, () where unknown.
    """

    inputs: ArraySource
    targets: ArraySource
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class WindowSet(FileSet):
    """Windows over the steps of files.

    Parameters
    ----------
    length : int
        Steps of a sample.
    stride : int, optional
        Steps from one window to the next.

    Raises
    ------
    ConfigError
        A number of steps below 1.
    """

    length: int = 128
    stride: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(length=self.length, stride=self.stride)

    @property
    @abstractmethod
    def target_steps(self) -> range:
        """The steps of a target, counted from the first step of its sample."""

    @property
    @abstractmethod
    def window_stride(self) -> int:
        """Steps from one window to the next."""

    @abstractmethod
    def open_steps(self, paths: Sequence[Path], train: Sequence[Path]) -> dict[Path, StepArrays]:
        """Open the steps of all files.

        Parameters
        ----------
        train : sequence of Path
            The files of the training split, which the others must fit.

        Raises
        ------
        DataError
            A file is missing or damaged, or does not fit the first one.
        """

    def open(
        self, folder: Path, task: Task = DEFAULT_TASK, validation: Paths | float | None = None
    ) -> DatasetSplits:
        shares = {"test": self.test, "validation": validation}
        held_out = {name: share for name, share in shares.items() if isinstance(share, float)}
        files = self._split_files(folder, None if isinstance(validation, float) else validation)
        return make_splits(self._open_splits(files, held_out), task)

    def open_sources(self, files: Mapping[str, SplitFiles], task: Task) -> dict[str, SplitSources]:
        return self._open_splits(files, {})

    def _open_splits(
        self, files: Mapping[str, SplitFiles], held_out: Mapping[str, float]
    ) -> dict[str, SplitSources]:
        """Return the windows of all splits, of which shares are held out of the training files."""
        paths = {split: part.paths for split, part in files.items()}
        for split, part in files.items():
            if part.is_shared:
                raise no_test_split(part.paths[0], f"has no steps apart for the {split} split", "")
        steps = self.open_steps([p for part in paths.values() for p in part], paths["train"])
        total = sum(len(steps[path].inputs) for path in paths["train"])
        parts = {
            split: self._windows(split, paths["train"], steps, steps_of_split)
            for split, steps_of_split in _hold_out_ends(total, held_out).items()
        }
        for split in [name for name in paths if name != "train"]:
            total = sum(len(steps[path].inputs) for path in paths[split])
            parts[split] = self._windows(split, paths[split], steps, range(total))
        return parts

    def open_samples(self, path: Path, folder: Path, task: Task) -> tuple[ArraySource, ...]:
        train = self._split_files(folder, None)["train"].paths
        inputs = self.open_steps([*train, path], train)[path].inputs
        count = 1 + (len(inputs) - self.length) // self.window_stride
        if count < 1:
            raise self._too_short(path, "", len(inputs), self.length)
        return (WindowSource(inputs, 0, self.length, self.window_stride, count),)

    def _windows(
        self,
        split: str,
        paths: Sequence[Path],
        steps: Mapping[Path, StepArrays],
        steps_of_split: range,
    ) -> SplitSources:
        """Return the windows of a split that lie in a range of the steps of all files together."""
        parts, start = [], 0
        targets = self.target_steps
        for path in paths:
            arrays = steps[path]
            first = max(steps_of_split.start - start, 0)
            last = min(steps_of_split.stop - start, len(arrays.inputs))
            start += len(arrays.inputs)
            if last - first < targets.stop:
                continue
            stride = self.window_stride
            count = 1 + (last - first - targets.stop) // stride
            x = WindowSource(arrays.inputs, first, self.length, stride, count)
            y = WindowSource(
                arrays.targets,
                first + targets.start,
                len(targets),
                stride,
                count,
                counts_bytes=arrays.targets is not arrays.inputs,
            )
            parts.append(SplitSources(str(path), (x,), y, arrays.class_names))
        if not parts:
            raise self._too_short(paths[0], f"the {split} split has ", len(steps_of_split), 0)
        return combine(parts)

    def _too_short(self, path: Path, subject: str, steps: int, needed: int) -> DataError:
        return DataError(
            "data.no-windows",
            f"{path}: {subject}{steps:,} steps, but a window needs "
            f"{needed or self.target_steps.stop:,}: give more data, or a smaller length",
        )


def _hold_out_ends(total: int, shares: Mapping[str, float]) -> dict[str, range]:
    """Return the steps of the training split, and of the shares that are held out behind it."""
    ranges, stop = {}, total
    for name, share in shares.items():
        start = stop - round(share * stop)
        ranges[name], stop = range(start, stop), start
    return {"train": range(stop), **ranges}


def check_steps(**steps: int | None) -> None:
    """Refuse numbers of steps below 1; None stands for a default.

    Raises
    ------
    ConfigError
        It names the key.
    """
    for key, number in steps.items():
        if number is not None and number < 1:
            raise ConfigError("data.steps", f"[data] {key} = {number} must be at least 1")
