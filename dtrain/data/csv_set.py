"""Tables of comma-separated values: one sample per line, numbers in its columns, and its target.

=================================  ===========================================
target column                      targets
=================================  ===========================================
texts                              class labels, in the order of sorted texts
whole numbers                      integers: class labels, or values
numbers, some with a fraction      real numbers (n, 1)
several columns                    (n, columns)
=================================  ===========================================

Features are integers if all of them are whole numbers, else float64; the same for all splits.

Invariant: a table is read as a whole when the set is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from dtrain.data.array_source import ArraySource, MemorySource
from dtrain.data.conversion import Array
from dtrain.data.csv_table import Columns, Layout, Table, is_number, read_layout, read_table
from dtrain.data.file_set import FileSet, SplitFiles, combine, expand_paths, no_test_split
from dtrain.data.source_dataset import SplitSources
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import Task

LARGEST_INTEGER = 2**24
"""Whole numbers up to this one are exact in float32, as which integers are trained on."""


@final
@dataclass(frozen=True)
class Csv(FileSet):
    """Samples in the lines of tables, numbers separated by commas or other delimiters.

    Parameters
    ----------
    target : optional
        Column of the target: its name in the header, or its number from 0, from the end if
        negative. A list gives several targets. Default: the last column; none where the input is
        the target.
    features : optional
        Columns of the samples, in this order. Default: all others.
    delimiter : optional
        Character between fields. Default: the most frequent one of comma, semicolon, tab and bar
        in the first line.
    """

    target: str | int | tuple[str | int, ...] | None = None
    features: tuple[str | int, ...] | None = None
    delimiter: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ConfigError(
                "data.delimiter",
                f'[data] delimiter = "{self.delimiter}" must be one character; "\\t" is a tab',
            )

    def open_sources(self, files: Mapping[str, SplitFiles], task: Task) -> dict[str, SplitSources]:
        if files.get("test") and files["test"].is_shared:
            raise no_test_split(files["test"].paths[0], "holds the training samples alone", "")
        reference = self._layout(files["train"].paths[0])
        chosen = self._choose(reference, task)
        has_texts = len(chosen.targets) == 1 and not is_number(
            reference.first_row[chosen.targets[0]]
        )
        if has_texts and task.kind_of(is_integer=True) != "classes":
            raise DataError(
                "data.csv-text-targets",
                f"{reference.path}: the target {reference.column_name(chosen.targets[0])} is a "
                f'text, but [task] loss = "{task.loss}" needs numbers: set [data] target to '
                "another column",
            )
        tables = {
            split: [self._read(path, reference, chosen, has_texts) for path in part.paths]
            for split, part in files.items()
        }
        return _sources(tables, task)

    def open_samples(self, path: Path, folder: Path, task: Task) -> tuple[ArraySource, ...]:
        reference = self._layout(expand_paths(self.train, folder, "train")[0])
        features = self._choose(reference, task).features
        layout = read_layout(path, self.delimiter, self.features or ())
        if layout.header or layout.count != len(features):
            columns = _same_columns(layout, reference, Columns(features, ()))
        else:
            columns = Columns(tuple(range(layout.count)), ())  # without a target
        return _samples(read_table(layout, columns, has_texts=False))

    def _layout(self, path: Path) -> Layout:
        targets = self.target if isinstance(self.target, tuple) else (self.target,)
        named = [name for name in (*targets, *(self.features or ())) if name is not None]
        return read_layout(path, self.delimiter, named)

    def _choose(self, layout: Layout, task: Task) -> Columns:
        """Return the columns that the keys name."""
        target = self.target
        if target is None:
            target = () if task.target == "input" else (-1,)
        names = target if isinstance(target, tuple) else (target,)
        targets = tuple(layout.position(name, "target") for name in names)
        if not targets and task.target == "data":
            raise ConfigError("data.no-target", "[data] target = []: name at least one column")
        if self.features is None:
            features = tuple(i for i in range(layout.count) if i not in targets)
        else:
            features = tuple(layout.position(name, "features") for name in self.features)
        if not features or set(features) & set(targets):
            raise ConfigError(
                "data.features",
                f"[data] features: {layout.path} leaves {len(features)} columns, and no column "
                "may be both feature and target",
            )
        return Columns(features, targets if task.target == "data" else ())

    def _read(self, path: Path, reference: Layout, chosen: Columns, has_texts: bool) -> Table:
        layout = self._layout(path)
        columns = _same_columns(layout, reference, chosen)
        return read_table(layout, columns, has_texts=has_texts)


def read_samples(path: Path) -> tuple[ArraySource, ...]:
    """Return a table all of whose columns are features.

    Raises
    ------
    DataError
        A field is missing, or no number.
    """
    layout = read_layout(path, None)
    columns = Columns(tuple(range(layout.count)), ())
    return _samples(read_table(layout, columns, has_texts=False))


def _samples(table: Table) -> tuple[ArraySource, ...]:
    dtype = _common_dtype([table.features])
    return (MemorySource(table.features.astype(dtype, copy=False), str(table.path)),)


def _same_columns(layout: Layout, reference: Layout, chosen: Columns) -> Columns:
    """Return the columns of one more file that are those of the first one, by name if both have a
    header."""
    if layout.header == reference.header and layout.count == reference.count:
        return chosen
    names = reference.header
    if layout.header and names and len({*names}) == len(names):
        features, targets = (
            tuple(_find(layout, reference, names[i]) for i in part)
            for part in (chosen.features, chosen.targets)
        )
        return Columns(features, targets)
    if layout.count != reference.count:
        raise DataError(
            "data.csv-columns",
            f"{layout.path} has {layout.count} columns and {reference.path} {reference.count}: "
            "make them equal, or set [data] delimiter",
        )
    return chosen


def _find(layout: Layout, reference: Layout, name: str) -> int:
    if layout.header.count(name) != 1:
        raise DataError(
            "data.csv-columns",
            f"{layout.path} has {layout.header.count(name)} columns '{name}', and {reference.path} "
            "one: make them equal",
        )
    return layout.header.index(name)


def _sources(tables: Mapping[str, Sequence[Table]], task: Task) -> dict[str, SplitSources]:
    """Return the splits of tables, with features and targets of one dtype each.

    A class label is a number per sample; other targets are (n, columns), as models return them.
    """
    everything = [table for part in tables.values() for table in part]
    x_dtype = _common_dtype([table.features for table in everything])
    y_dtype = _common_dtype([table.targets for table in everything])
    classes = tuple(sorted({text for table in tables["train"] for text in table.texts}))
    is_label = task.kind_of(is_integer=y_dtype is np.int64) in ("classes", "probabilities")

    def source(table: Table) -> SplitSources:
        location = str(table.path)
        samples = (MemorySource(table.features.astype(x_dtype, copy=False), location),)
        if not table.targets.shape[1]:
            return SplitSources(location, samples, None)
        targets = table.targets.astype(y_dtype, copy=False)
        targets = _number_classes(table, targets, classes) if classes else targets
        targets = targets[:, 0] if is_label and targets.shape[1] == 1 else targets
        return SplitSources(location, samples, MemorySource(targets, location), classes)

    return {split: combine([source(table) for table in part]) for split, part in tables.items()}


def _number_classes(table: Table, targets: Array, classes: tuple[str, ...]) -> Array:
    """Return the numbers of the classes in place of those of the texts of one table."""
    for number, text in enumerate(table.texts):
        if text not in classes:
            sample = int(np.flatnonzero(targets[:, 0] == number)[0])
            raise DataError(
                "data.class-unknown",
                f"{table.path}: the class '{text}' of sample {sample} is not among the "
                f"{len(classes)} classes of the training split: correct it, or add samples of it "
                "there",
            )
    numbers = np.array([classes.index(text) for text in table.texts], np.int64)
    return numbers[targets]


def _common_dtype(parts: Iterable[Array]) -> type[np.generic]:
    """Return int64 if all numbers are whole and exact in float32, else float64."""
    is_whole = all(
        bool((np.abs(part) <= LARGEST_INTEGER).all() and (part == np.floor(part)).all())
        for part in parts
    )
    return np.int64 if is_whole else np.float64
