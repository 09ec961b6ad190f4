"""Citation graphs of Planetoid: the samples are the nodes of one graph, in every split.

A split differs from the others in its labels alone: a node that is not in it has the label that the
loss and the metrics ignore. So a batch of all nodes is the whole graph, and a part of the nodes is
a micro-batch. The number of a node is the second input of its sample, from which layers find its
neighbours; the edges are a constant of the data set, `Dataset.graph`.

::

    node     features     label in train     in validation     in test
    0        x[0]         y[0]               ignore            ignore
    140      x[140]       ignore             y[140]            ignore
    1708     x[1708]      ignore             ignore            y[1708]

Invariant: a file is read without pickles; `dtrain data import` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

import h5py
import numpy as np

from dtrain.data.array_source import LazySource, MemorySource
from dtrain.data.conversion import Array
from dtrain.data.dataset import DatasetSplits
from dtrain.data.formats.hdf5_source import missing_datasets, open_hdf5
from dtrain.data.source_dataset import SplitSources, make_splits
from dtrain.errors import ConfigError, DataError
from dtrain.node_graph import NodeGraph
from dtrain.paths import expand_text
from dtrain.tasks.task import DEFAULT_TASK, Task

SPLITS = ("train", "validation", "test")


@final
@dataclass(frozen=True)
class Planetoid:
    """A graph with features and labels of its nodes, and the public split.

    Parameters
    ----------
    file : str
        The HDF5 file that `dtrain data import` wrote.
    scale_nodes : bool
        Divide the features of each node by their sum. Then `normalise` changes nothing.
    """

    file: str
    scale_nodes: bool = True

    def open(self, folder: Path, task: Task = DEFAULT_TASK) -> DatasetSplits:
        """Return the three splits: all nodes each; labels are read, features on first need.

        Raises
        ------
        ConfigError
            The task has no label that is ignored.
        DataError
            The file is missing or damaged, or its arrays do not fit each other.
        """
        if task.ignore_index is None:
            raise ConfigError(
                "data.no-ignored-label",
                '[data] name = "planetoid" has nodes without a label in each split: set [task] '
                "ignore-index = -100, the label that they get",
            )
        path = folder / expand_text(self.file, "[data] file =", folder, "data.variable-unset")
        shape, arrays = _read(path)
        labels, nodes = arrays["y"], shape[0]
        _check(path, arrays, nodes)
        features = LazySource(
            shape, np.float32, cache(lambda: self._read_features(path)), f"{path} 'x'"
        )
        numbers = MemorySource(np.arange(nodes), "the numbers of the nodes")
        moments = (np.zeros(shape[1]), np.ones(shape[1])) if self.scale_nodes else None
        parts = {}
        for split in SPLITS:
            y = np.full(nodes, task.ignore_index, np.int64)
            y[arrays[split]] = labels[arrays[split]]
            y[labels < 0] = task.ignore_index
            targets = MemorySource(y, f"{path} 'y'")
            parts[split] = SplitSources(str(path), (features, numbers), targets, (), moments)
        splits = make_splits(parts, task)
        trained = arrays["train"]
        members = [trained[labels[trained] == label] for label in range(splits.train.classes)]
        graph = NodeGraph.from_edges(nodes, arrays["edges"].T, members)
        for dataset in splits.by_name().values():
            dataset.graph = graph
        return splits

    def _read_features(self, path: Path) -> Array:
        """Return the features of all nodes, (nodes, features) float32."""
        with open_hdf5(path) as file:
            x: Array = file["x"][()].astype(np.float32)
        if not self.scale_nodes:
            return x
        sums = x.sum(1, keepdims=True)
        scaled: Array = np.divide(x, sums, out=np.zeros_like(x), where=sums != 0)
        return scaled


def _read(path: Path) -> tuple[tuple[int, ...], dict[str, Array]]:
    """Return the shape of the features, and the other arrays of a file by name."""
    names = ("y", "edges", *SPLITS)
    with open_hdf5(path) as file:
        missing = [name for name in ("x", *names) if not isinstance(file.get(name), h5py.Dataset)]
        if missing:
            raise missing_datasets(file, missing, path)
        return tuple(file["x"].shape), {name: file[name][()] for name in names}


def _check(path: Path, arrays: dict[str, Array], nodes: int) -> None:
    """Refuse arrays that are no integers, or that name nodes which do not exist."""
    labels, edges = arrays["y"], arrays["edges"]
    fits = all(array.dtype.kind in "iu" for array in arrays.values())
    fits = fits and labels.shape == (nodes,) and edges.ndim == 2 and edges.shape[1] == 2
    numbers = [arrays[name].ravel() for name in ("edges", *SPLITS)] if fits else []
    if not fits or any(a.min(initial=0) < 0 or a.max(initial=0) >= nodes for a in numbers):
        raise DataError(
            "data.graph-damaged",
            f"{path}: y must be ({nodes},) integers, edges (n, 2), and edges, train, validation "
            f"and test numbers of nodes below {nodes}: import the data set again",
        )
