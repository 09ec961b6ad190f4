"""Data sets in files that hold several arrays under names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.data.array_names import NameRules, SplitNames, list_arrays
from dtrain.data.array_source import ArraySource
from dtrain.data.file_set import FileSet, SplitFiles, combine, no_test_split
from dtrain.data.source_dataset import SplitSources
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import Task

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class NamedArraySet(FileSet):
    """Samples and targets in files, under names.

    Parameters
    ----------
    x : str or tuple of str
        Name of the samples; several names are several inputs of the model, in their order.
    y : str
        Name of the targets.
    test_x, test_y : optional
        Name in the test split, if it is another. In one file for all splits, the default is the
        training name with "test" in place of "train".
    validation_x, validation_y : optional
        Name in the validation split. Without the key `validation`, the training file holds this
        split, too.
    weights : str, optional
        Name of the weights of the training samples in the loss, (n,); without it all count alike.
    """

    x: Names = "x"
    y: str = "y"
    test_x: Names | None = None
    test_y: str | None = None
    validation_x: Names | None = None
    validation_y: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("x", "test_x", "validation_x"):
            if getattr(self, key) == ():
                raise ConfigError(
                    "data.no-names", f"[data] {key.replace('_', '-')} = []: give at least one name"
                )

    @abstractmethod
    def list_names(self, path: Path) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of all arrays of a file by name."""

    @abstractmethod
    def has_name(self, path: Path, name: str) -> bool:
        """Return whether a file has an array of this name."""

    @abstractmethod
    def open_array(self, path: Path, name: str) -> ArraySource:
        """Return the rows of one array of a file.

        Raises
        ------
        DataError
            The file is missing or damaged, or lacks the array.
        """

    def open_split(self, path: Path, names: SplitNames, needs_targets: bool) -> SplitSources:
        """Return what one file gives for a split."""
        inputs = tuple(self.open_array(path, name) for name in names.inputs)
        targets = self.open_array(path, names.targets) if needs_targets else None
        return SplitSources(str(path), inputs, targets)

    @property
    def rules(self) -> NameRules:
        """The names that the keys give."""
        own = {
            "test": (_optional_names(self.test_x), self.test_y),
            "validation": (_optional_names(self.validation_x), self.validation_y),
        }
        return NameRules(_names(self.x), self.y, own)

    def has_validation_names(self) -> bool:
        return self.validation_x is not None or self.validation_y is not None

    def open_sources(self, files: Mapping[str, SplitFiles], task: Task) -> dict[str, SplitSources]:
        needs_targets = task.target == "data"
        return {
            split: combine([self._open(path, split, part, needs_targets) for path in part.paths])
            for split, part in files.items()
        }

    def _open(self, path: Path, split: str, files: SplitFiles, needs_targets: bool) -> SplitSources:
        """Return what one file gives for a split, with the weights of training samples."""
        names = self.find_names(path, split, files.is_shared, needs_targets)
        part = self.open_split(path, names, needs_targets)
        if split != "train" or self.weights is None:
            return part
        return replace(part, weights=self.open_array(path, self.weights))

    def open_samples(self, path: Path, folder: Path, task: Task) -> tuple[ArraySource, ...]:
        names = self.find_names(path, "test", is_shared=False, needs_targets=False)
        return self.open_split(path, names, needs_targets=False).inputs

    def find_names(
        self, path: Path, split: str, is_shared: bool, needs_targets: bool
    ) -> SplitNames:
        """Return the names of a split in a file.

        Raises
        ------
        ConfigError
            The training file has no such split.
        DataError
            The file has no arrays of these names.
        """
        rules = self.rules

        def has(name: str) -> bool:
            return self.has_name(path, name)

        names = rules.find(split, has, is_shared=is_shared, needs_targets=needs_targets)
        if names is not None:
            return names
        wanted = rules.first(split, is_shared=is_shared, needs_targets=needs_targets)
        if is_shared and not any(rules.own.get(split, ())):
            arrays = list_arrays(self.list_names(path), [])
            cure = "test-x and test-y to names in this file, "
            raise no_test_split(path, f"has none that is found by its name ({arrays})", cure)
        missing = [name for name in wanted if not has(name)]
        inputs, targets = rules.own.get(split, (None, None))
        is_given = {*(inputs or ()), targets}.intersection(missing)
        if is_shared and not is_given:
            arrays = list_arrays(self.list_names(path), [])
            raise ConfigError(
                "data.names-of-training",
                f"[data] {split}-x and {split}-y must both be set, to other arrays of {path} than "
                f"x and y, of {arrays}",
            )
        raise self.missing_array(path, missing)

    def missing_array(self, path: Path, names: Sequence[str]) -> DataError:
        """Return the error for names that a file lacks."""
        text = " and ".join(f"'{name}'" for name in names)
        return DataError(
            "data.array-missing",
            f"{path} has no array {text}, only "
            f"{list_arrays(self.list_names(path), names)}: set x and y to the names of samples and "
            "targets",
        )


def _names(value: Names) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _optional_names(value: Names | None) -> tuple[str, ...] | None:
    return None if value is None else _names(value)
