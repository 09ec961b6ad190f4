"""Files of numpy: `.npz` with arrays under names, and `.npy` with one array each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from dtrain.data.array_names import DEFAULT_NAMES, NameRules
from dtrain.data.array_source import ArraySource, ConcatenatedSource
from dtrain.data.file_set import SplitFiles, combine, expand_paths, no_test_split
from dtrain.data.named_array_set import NamedArraySet, Names
from dtrain.data.npy_source import has_npz_array, npz_shapes, open_npy, open_npz_array
from dtrain.data.source_dataset import SplitSources
from dtrain.errors import ConfigError
from dtrain.tasks.task import Task


@final
@dataclass(frozen=True)
class Npz(NamedArraySet):
    """Samples and targets in `.npz` files, or in pairs of `.npy` files.

    Parameters
    ----------
    train_y : optional
        The `.npy` file of the targets where `train` is a `.npy` file; likewise `test-y` and
        `validation-y`, and `weights`.
    """

    train_y: str | None = None

    @property
    def rules(self) -> NameRules:
        """The names that the keys give."""
        rules = super().rules
        return NameRules(rules.inputs, rules.targets, {**rules.own, "train": (None, self.train_y)})

    def list_names(self, path: Path) -> Mapping[str, tuple[int, ...]]:
        return npz_shapes(path)

    def has_name(self, path: Path, name: str) -> bool:
        return has_npz_array(path, name)

    def open_array(self, path: Path, name: str) -> ArraySource:
        return open_npz_array(path, name)

    def open_sources(self, files: Mapping[str, SplitFiles], task: Task) -> dict[str, SplitSources]:
        pairs = {split: part for split, part in files.items() if _is_npy(part.paths[0])}
        others = {split: part for split, part in files.items() if split not in pairs}
        sources = super().open_sources(others, task)
        if pairs and ((*_names(self.x), self.y) != DEFAULT_NAMES or self.test_x):
            raise ConfigError(
                "data.names-of-npy",
                f"{next(iter(pairs.values())).paths[0]} holds one array without a name: leave out "
                "x, y and test-x; train-y and test-y are the files of the targets",
            )
        for split, part in pairs.items():
            sources[split] = self._open_pair(split, part, task.target == "data")
        return {split: sources[split] for split in files}

    def open_samples(self, path: Path, folder: Path, task: Task) -> tuple[ArraySource, ...]:
        return (open_npy(path),) if _is_npy(path) else super().open_samples(path, folder, task)

    def _open_pair(self, split: str, files: SplitFiles, needs_targets: bool) -> SplitSources:
        """Return what the `.npy` files of a split give."""
        if files.is_shared:
            raise no_test_split(files.paths[0], "holds the training samples alone", "")
        if not needs_targets:
            return combine([SplitSources(str(x), (open_npy(x),), None) for x in files.paths])
        key, value = f"{split}-y", getattr(self, f"{split}_y")
        if value is None:
            raise ConfigError(
                "data.no-target-files",
                f"{files.paths[0]} holds samples alone: set {key} to the .npy file of the targets",
            )
        targets = expand_paths(value, files.folder, key)
        if len(targets) != len(files.paths):
            raise ConfigError(
                "data.target-files",
                f"[data] {split} has {len(files.paths)} files and {key} {len(targets)}: give one "
                "file of targets per file of samples",
            )
        pairs = zip(files.paths, targets, strict=True)
        part = combine([SplitSources(str(x), (open_npy(x),), open_npy(y)) for x, y in pairs])
        if split != "train" or not self.weights:
            return part
        paths = expand_paths(self.weights, files.folder, "weights")
        weights = ConcatenatedSource([open_npy(path) for path in paths], self.weights)
        return dataclasses.replace(part, weights=weights)


def _is_npy(path: Path) -> bool:
    return path.suffix == ".npy"


def _names(value: Names) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
