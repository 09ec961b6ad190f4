"""Data sets in files: the files of each split, whatever their format.

===============================  ==================================================================
`train = "a.h5"`, `test = ...`   each split has files of its own
`train = "all.h5"`               without `test`, the training files hold the test split, too
`train = "a.h5"`, `test = 0.2`   a share of the training split is held out as the test split
`train = "part-*.h5"`            several files are one split, their samples one after another
===============================  ==================================================================

A path may hold `~`, `$VARIABLE` and a pattern; relative paths start in the run file's folder.

Invariant: shapes and targets are known when a set is open; samples are read on first need.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from dtrain.data.array_source import ArraySource, ConcatenatedSource
from dtrain.data.conversion import NUMERIC_KINDS
from dtrain.data.dataset import DatasetSplits, check_splits
from dtrain.data.hold_out import hold_out_part
from dtrain.data.source_dataset import SplitSources, check_arrays, make_split, make_splits
from dtrain.errors import ConfigError, DataError
from dtrain.paths import expand_text
from dtrain.schema import convert, kebab
from dtrain.tasks.task import DEFAULT_TASK, Task

Paths = str | tuple[str, ...]
"""One file, a pattern of files, or several of both."""


TEST_SEED = 0
"""The share that is the test split does not depend on the run's seed, so runs can be compared."""


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split.

    Attributes
    ----------
    paths : tuple of Path
        In the order of the samples.
    folder : Path
        Relative paths of other keys start here.
    is_shared : bool
        Whether the files are those of the training split.
    """

    paths: tuple[Path, ...]
    folder: Path
    is_shared: bool = False


@dataclass(frozen=True)
class FileSet(ABC):
    """A data set in files.

    Parameters
    ----------
    train : str or tuple of str
        File of the training split; or several files, or patterns as "part-*.h5", as one split.
    test : str, tuple of str or float, optional
        Likewise for the test split. Or the share of the training split that is held out for it. By
        default, the training file holds it, too.

    Raises
    ------
    ConfigError
        A value does not fit its key.
    """

    train: Paths
    test: Paths | float | None = None

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, key = getattr(self, field.name), f"[data] {kebab(field.name)}"
            if field.name in ("train", "test"):
                _check_paths(value, key, may_be_share=field.name == "test")
            elif value is not None or field.default is not None:
                convert(value, hints[field.name], key)

    def open(
        self, folder: Path, task: Task = DEFAULT_TASK, validation: Paths | None = None
    ) -> DatasetSplits:
        """Open the files; no sample is read.

        Parameters
        ----------
        folder : Path
            Relative paths start here.
        validation : str or tuple of str, optional
            Files of the validation split.

        Raises
        ------
        DataError
            A file is missing or damaged, or the splits do not fit each other.
        """
        sources = self.open_sources(self._split_files(folder, validation), task)
        for part in sources.values():
            for source in part.inputs:
                check_numeric(source)
        if not isinstance(self.test, float):
            return make_splits(sources, task)
        train = make_split(sources["train"], task)
        kept, test = hold_out_part(train, self.test, "test", TEST_SEED, task)
        others = {
            name: make_split(part, task, train) for name, part in sources.items() if name != "train"
        }
        return check_splits(DatasetSplits(kept, test, **others), sources["train"].location)

    @abstractmethod
    def open_sources(self, files: Mapping[str, SplitFiles], task: Task) -> dict[str, SplitSources]:
        """Return what each split is read from.

        Parameters
        ----------
        files : mapping
            The files of "train" and of the other splits that are not held out.

        Raises
        ------
        DataError
            A file is missing or damaged, or lacks a part.
        """

    @abstractmethod
    def open_samples(self, path: Path, folder: Path, task: Task) -> tuple[ArraySource, ...]:
        """Return the samples of one more file, as those of the test split, without targets.

        Parameters
        ----------
        folder : Path
            Relative paths of the keys start here.

        Raises
        ------
        DataError
            The file is missing or damaged, or lacks the samples.
        """

    def has_validation_names(self) -> bool:
        """Return whether the keys name a validation split in the training file."""
        return False

    def _split_files(self, folder: Path, validation: Paths | None) -> dict[str, SplitFiles]:
        paths = {"train": self.train, "test": self.test, "validation": validation}
        files = {
            split: SplitFiles(expand_paths(value, folder, split), folder)
            for split, value in paths.items()
            if value is not None and not isinstance(value, float)
        }
        shared = SplitFiles(files["train"].paths, folder, is_shared=True)
        if self.test is None:
            files["test"] = shared
        if validation is None and self.has_validation_names():
            files["validation"] = shared
        return files


def _check_paths(value: Any, key: str, *, may_be_share: bool) -> None:
    """Refuse a value that is no path, no list of paths and, where it may be one, no share."""
    if may_be_share and (value is None or isinstance(value, float)):
        if isinstance(value, float) and not 0 < value < 1:
            raise ConfigError(
                "data.test-no-share",
                f"{key} = {value} must be more than 0 and less than 1, or the path of a file",
            )
        return
    paths = value if isinstance(value, tuple) else (value,)
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ConfigError(
            "data.path-invalid", f"{key} = {value!r}: give the path of a file, or a list of paths"
        )


def no_test_split(path: Path, found: str, cure: str) -> ConfigError:
    """Return the error for a training file that has no test split."""
    return ConfigError(
        "data.no-test-split",
        f"[data] names no test split, and {path} {found}: set {cure}test to another file, or "
        "test = 0.2 to hold out a share of the training split",
    )


# Paths


def expand_paths(paths: Paths, folder: Path, key: str) -> tuple[Path, ...]:
    """Return the files of a path, a pattern or a list of both, those of a pattern in natural order.

    Raises
    ------
    ConfigError
        A variable is not set.
    DataError
        A pattern has no match.
    """
    texts = (paths,) if isinstance(paths, str) else paths
    return tuple(path for text in texts for path in _expand(text, folder, key))


def _expand(text: str, folder: Path, key: str) -> list[Path]:
    expanded = expand_text(text, f"[data] {key} =", folder, "data.variable-unset")
    path = folder / expanded
    if not re.search(r"[*?[]", expanded) or path.exists():
        return [path]
    matches = [Path(match) for match in glob(str(path), recursive=True)]
    files = sorted((match for match in matches if match.is_file()), key=_natural_order)
    if not files:
        raise DataError(
            "data.no-match",
            f'[data] {key} = "{text}": no file matches {path}: correct the pattern',
        )
    return files


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sorting key by which part-2 comes before part-10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


# Several files as one split


def combine(parts: Sequence[SplitSources]) -> SplitSources:
    """Return several files as one split; their statistics only if all hold the same.

    Raises
    ------
    DataError
        They differ in shape, dtype or class names; or one has not as many targets as samples.
    """
    if len(parts) == 1:
        return parts[0]
    first, last = parts[0], parts[-1]
    location = f"{first.location} ... {last.location} ({len(parts)} files)"
    for part in parts:
        check_arrays(part.inputs[0], part.targets or part.inputs[0], part.location)
        if part.class_names != first.class_names:
            raise DataError(
                "data.class-names-differ",
                f"{part.location} has the classes {', '.join(part.class_names) or '(none)'} and "
                f"{first.location} {', '.join(first.class_names) or '(none)'}: make them equal",
            )
    inputs = tuple(
        ConcatenatedSource(sources, location)
        for sources in zip(*(part.inputs for part in parts), strict=True)
    )
    targets = [part.targets for part in parts if part.targets is not None]
    weights = [part.weights for part in parts if part.weights is not None]
    return SplitSources(
        location,
        inputs,
        ConcatenatedSource(targets, location) if targets else None,
        first.class_names,
        _common_moments(parts),
        ConcatenatedSource(weights, location) if weights else None,
    )


def _common_moments(parts: Sequence[SplitSources]) -> Any:
    """Return the moments that all files hold, None where they differ."""
    stored = [part.moments for part in parts]
    texts = {None if m is None else tuple(each.tobytes() for each in m) for m in stored}
    return stored[0] if len(texts) == 1 else None


def check_numeric(source: ArraySource) -> None:
    """Refuse samples that are texts, records or objects.

    Raises
    ------
    DataError
        It names the array.
    """
    if source.dtype.kind not in NUMERIC_KINDS:
        raise DataError(
            "data.samples-dtype",
            f"{source.location} has dtype {source.dtype}: convert it to integers, real or complex "
            "numbers",
        )
