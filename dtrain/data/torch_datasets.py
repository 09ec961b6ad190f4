"""Map-style datasets of torch as splits: items are read by index when they are needed.

Invariant: targets are the second parts of the items. The list of targets that a Dataset has is used
in their place only if it equals those of some items.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
from torch import Tensor

from dtrain.data.array_source import ArraySource, MemorySource
from dtrain.data.conversion import Array
from dtrain.data.item_sources import ItemReader, ItemSource, ItemTargets
from dtrain.data.source_dataset import SplitSources
from dtrain.tasks.task import Task

COMPARED_ITEMS = 8
"""Items whose targets are compared with a list of targets."""


ITEMS_PER_READ = 256


@final
@dataclass
class TargetPass:
    """Targets for which all items must be read; several ranks share the work.

    Attributes
    ----------
    known : dict of int to array
        The targets that have been read, by the number of the request.
    pending : list of ItemTargets
        Those that are needed and not known.
    """

    known: dict[int, Array] = field(default_factory=dict)
    pending: list[ItemTargets] = field(default_factory=list)


class TargetsNeeded(Exception):
    """Targets are to be read before the data can be opened."""


_PASS: ContextVar[TargetPass | None] = ContextVar("target_pass", default=None)


@contextmanager
def shared_target_pass(known: dict[int, Array]) -> Iterator[TargetPass]:
    """Let data that need a pass over all items raise `TargetsNeeded` instead of reading them.

    Parameters
    ----------
    known : dict
        The results of earlier passes.
    """
    target_pass = TargetPass(known)
    token = _PASS.set(target_pass)
    try:
        yield target_pass
    finally:
        _PASS.reset(token)


def read_targets(targets: ArraySource, rows: range) -> Array:
    """Read the targets of many items."""
    parts = [
        targets.read_range(start, min(start + ITEMS_PER_READ, rows.stop))
        for start in range(rows.start, rows.stop, ITEMS_PER_READ)
    ]
    return np.concatenate(parts) if parts else np.empty((0, *targets.shape[1:]), targets.dtype)


def are_torch_datasets(values: object) -> bool:
    """Return whether values are two or three `torch.utils.data.Dataset`."""
    module = sys.modules.get("torch.utils.data")  # imported, if a Dataset exists
    return (
        module is not None
        and isinstance(values, list | tuple)
        and len(values) in (2, 3)
        and all(isinstance(value, module.Dataset) for value in values)
    )


def item_splits(
    datasets: Sequence[Any], location: str, task: Task, classes: int | None = None
) -> dict[str, SplitSources]:
    """Return the sources of two or three map-style Datasets.

    Parameters
    ----------
    datasets : sequence of torch.utils.data.Dataset
        Training, test and perhaps validation.
    location : str
        For messages.
    task : Task
        Decides whether targets are classes.
    classes : int, optional
        Their number. Without it, all labels must be known at the start.

    Raises
    ------
    DataError
        A Dataset has no length or no items, or an item is no pair of sample and target.
    """
    parts = {}
    for name, dataset in zip(("train", "test", "validation"), datasets, strict=False):
        parts[name] = _split_sources(dataset, f"{location}, {name}", task, classes)
    if task.target == "data":
        _read_needed_labels(parts, task, classes)
    return parts


def _split_sources(dataset: Any, location: str, task: Task, classes: int | None) -> SplitSources:
    names = () if classes is None else tuple(map(str, range(classes)))
    arrays = _tensors(dataset)
    if arrays is not None and len(arrays) == 2:
        inputs, targets = (MemorySource(array, location) for array in arrays)
        return SplitSources(location, (inputs,), targets, names)
    reader = ItemReader(dataset, location)
    assert reader.first is not None
    samples = tuple(ItemSource(reader, position) for position in range(len(reader.first.inputs)))
    if task.target == "input":
        return SplitSources(location, samples, None)
    known = known_targets(dataset)
    if known is not None and _equals_items(known, reader):
        known = known.astype(reader.first.targets.dtype, copy=False)
        return SplitSources(location, samples, MemorySource(known, location), names)
    return SplitSources(location, samples, ItemTargets(reader, classes), names)


def _read_needed_labels(parts: dict[str, SplitSources], task: Task, classes: int | None) -> None:
    """Read the labels of splits that have no list of them, if the number of classes is unknown."""
    needed = {
        name: part.targets
        for name, part in parts.items()
        if isinstance(part.targets, ItemTargets)
        and (classes is None or task.labels == "compact")
        and task.kind_of(is_integer=True) == "classes"
    }
    target_pass = _PASS.get()
    if target_pass is None:
        read = {name: read_targets(part, range(len(part))) for name, part in needed.items()}
    elif len(target_pass.known) < len(needed):
        target_pass.pending = list(needed.values())
        raise TargetsNeeded
    else:
        read = dict(zip(needed, target_pass.known.values(), strict=True))
    for name, targets in read.items():
        parts[name] = replace(parts[name], targets=MemorySource(targets, parts[name].location))


def known_targets(dataset: Any) -> Array | None:
    """Return the targets of all items if a Dataset has a list of them, through `Subset` and
    `ConcatDataset`; else None."""
    from torch.utils.data import ConcatDataset, Subset

    if isinstance(dataset, Subset):
        known = known_targets(dataset.dataset)
        return None if known is None else known[np.asarray(dataset.indices, np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [known_targets(part) for part in dataset.datasets]
        arrays = [part for part in parts if part is not None]
        return np.concatenate(arrays) if len(arrays) == len(parts) else None
    tensors = _tensors(dataset)
    if tensors is not None:
        return tensors[-1]
    for name in ("targets", "labels"):
        value = getattr(dataset, name, None)
        if isinstance(value, list | tuple | np.ndarray | Tensor) and len(value) == len(dataset):
            return _numeric(value)
    return None


def _tensors(dataset: Any) -> tuple[Array, ...] | None:
    """Return the arrays of a `TensorDataset`, or of a `Subset` of one; else None."""
    from torch.utils.data import Subset, TensorDataset

    if type(dataset) is TensorDataset:
        return tuple(tensor.detach().cpu().numpy() for tensor in dataset.tensors)
    if type(dataset) is Subset:
        arrays = _tensors(dataset.dataset)
        rows = np.asarray(dataset.indices, np.int64)
        return None if arrays is None else tuple(array[rows] for array in arrays)
    return None


def _numeric(value: Any) -> Array | None:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except ValueError:  # of unequal lengths
        return None
    return array if array.dtype.kind in "biuf" else None


def _equals_items(known: Array, reader: ItemReader) -> bool:
    """Return whether targets are those of some items, over the whole Dataset."""
    rows = np.unique(np.linspace(0, reader.size - 1, COMPARED_ITEMS).astype(np.int64))
    return len(known) == reader.size and np.array_equal(known[rows], reader.targets(rows))
