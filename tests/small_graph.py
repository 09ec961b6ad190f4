"""A small graph as a file of `planetoid`, and runs on it.

23 nodes in three classes, two of them without edges; nodes of a class are likelier neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from dtrain.config.parse import parse_run
from dtrain.config.run import RunConfig
from dtrain.data.dataset import DatasetSplits
from dtrain.data.formats.planetoid_set import Planetoid
from dtrain.node_graph import NodeGraph
from dtrain.tasks.task import Task

NODES, FEATURES, CLASSES = 23, 6, 3
IGNORED = -100


def arrays() -> dict[str, NDArray[Any]]:
    """Return the arrays of the file by name."""
    random = np.random.default_rng(1)
    y = random.integers(0, CLASSES, NODES)
    y[:CLASSES] = range(CLASSES)
    x = np.eye(CLASSES, FEATURES)[y] + random.random((NODES, FEATURES))
    first, second = np.triu_indices(NODES - 2, 1)
    is_edge = random.random(len(first)) < np.where(y[first] == y[second], 0.4, 0.1)
    return {
        "x": x.astype(np.float32),
        "y": y,
        "edges": np.stack([first, second], 1)[is_edge],
        "train": np.arange(8),
        "validation": np.arange(8, 13),
        "test": np.arange(13, NODES),
    }


def write_graph(path: Path, **changes: Any) -> Path:
    """Write the file, with other arrays in place of some."""
    with h5py.File(path, "w") as file:
        for name, array in {**arrays(), **changes}.items():
            file[name] = array
    return path


def graph() -> NodeGraph:
    """Return the graph of the file."""
    parts = arrays()
    y, train = parts["y"], parts["train"]
    members = [train[y[train] == label] for label in range(CLASSES)]
    return NodeGraph.from_edges(NODES, parts["edges"].T, members)


def graph_run(path: Path, **changes: Any) -> RunConfig:
    """Return a run on the file; a dict changes keys of a table."""
    table: dict[str, Any] = {
        "seed": 3,
        "epochs": 3,
        "batch-size": NODES,
        "dtype": "float64",
        "threads": 1,
        "data": {"name": "planetoid", "file": str(path)},
        "task": {"ignore-index": IGNORED},
        "model": {"name": "gcn", "widths": [5, 4]},
        "partition": {"blocks": 3},
        "objective": {"name": "backprop"},
        "optimizer": {"name": "adam", "lr": 0.01},
        "log": {"every-s": 1000},
    }
    for key, value in changes.items():
        name = key.replace("_", "-")
        table[name] = {**table.get(name, {}), **value} if isinstance(value, dict) else value
    return parse_run(table, path.with_name("run.toml"))


def without_validation(file: str) -> DatasetSplits:
    """Return two splits of the file."""
    splits = Planetoid(file).open(Path(), Task(ignore_index=IGNORED))
    return DatasetSplits(splits.train, splits.test)


def draw_evenly(labels: NDArray[Any]) -> NDArray[Any]:
    """Return equal weights of all nodes, for a sampler."""
    return np.ones(len(labels))
