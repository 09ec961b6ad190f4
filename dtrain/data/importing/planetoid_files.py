"""The eight files of a Planetoid data set: `ind.NAME.x`, `y`, `tx`, `ty`, `allx`, `ally`, `graph`
and `test.index` (Yang, Cohen and Salakhutdinov 2016, "Revisiting Semi-Supervised Learning with
Graph Embeddings").

Seven of them are pickles of Python 2. The unpickler is restricted to numpy's arrays, SciPy's
matrices in compressed rows, and a defaultdict of lists. A matrix is rebuilt from its parts, so
SciPy need not be installed.

The public split: the training nodes are the rows of `x`, the 500 that follow are for validation,
and `test.index` has the number of the node of each row of `tx`. A number between the smallest and
the largest of them that is missing is a node without edges (citeseer has 15): it gets zeros as
features, and no label.

Invariant: a file that names anything else is refused before anything of it is called.
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np

from dtrain.data.conversion import Array
from dtrain.data.formats.hdf5_writer import create_rows
from dtrain.errors import ConfigError, DataError

FILES = re.compile(r"ind\.(?P<name>.+)\.(allx|ally|tx|ty|x|y|graph|test\.index)")


VALIDATION_NODES = 500


UNLABELLED = -1
"""The label of a node that has none."""


@final
class CompressedRows:
    """The parts of a SciPy matrix, which the unpickler sets: `_shape`, `data`, `indices`,
    `indptr`."""

    def to_array(self) -> Array:
        """Return the matrix (rows, columns) as a float32 array.

        Raises
        ------
        AttributeError, IndexError, ValueError
            A part is missing, or the parts do not fit each other.
        """
        parts: Mapping[str, Any] = vars(self)
        shape = parts["_shape"] if "_shape" in parts else parts["shape"]
        rows = np.repeat(np.arange(shape[0]), np.diff(parts["indptr"]))
        array = np.zeros(shape, np.float32)
        np.add.at(array, (rows, parts["indices"]), parts["data"])
        return array


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "defaultdict"): defaultdict,
    **{(module, "list"): list for module in ("__builtin__", "builtins")},
    **{
        (f"numpy.{core}.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0]  # type: ignore[misc]
        for core in ("core", "_core")
    },
    **{
        (f"scipy.sparse.{module}", name): CompressedRows
        for module in ("csr", "_csr")
        for name in ("csr_matrix", "csr_array")
    },
}
"""Everything that a file may name."""


@final
class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that finds the names of `KNOWN` alone.

    Raises
    ------
    DataError
        The file names another one.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function of a name."""
        if (module, name) not in KNOWN:
            raise DataError(
                "import.pickle-refused",
                f"the pickle names {module}.{name}: a Planetoid file holds arrays, matrices and "
                "lists alone; download it again from github.com/kimiyoung/planetoid",
            )
        return KNOWN[module, name]


@final
class PlanetoidFiles:
    """A graph with features, labels and the public split, as one file.

    Parameters
    ----------
    source : Path
        The folder of the files, or one of them.

    Attributes
    ----------
    names : tuple of str
        The name of the only file that is written.

    Raises
    ------
    ConfigError
        The folder has the files of several data sets.
    """

    names = ("train",)

    def __init__(self, source: Path) -> None:
        self._folder = source if source.is_dir() else source.parent
        names = _set_names(self._folder) if source.is_dir() else {_set_name(source)}
        if len(names) > 1:
            raise ConfigError(
                "import.several-graphs",
                f"{source} has the files of {', '.join(sorted(names))}: give the path of one of "
                "the files of the data set to import",
            )
        self._prefix = f"ind.{names.pop()}."

    def write(self, files: list[h5py.File]) -> None:
        """Write features, labels, edges and the nodes of each split.

        Raises
        ------
        DataError
            A file is missing or damaged, names something that is not of such files, or does not
            fit the others.
        """
        try:
            arrays = self._read()
        except DataError:
            raise
        except Exception as error:  # of any kind: the files are damaged or do not fit
            raise DataError(
                "import.graph-damaged",
                f"{self._folder}/{self._prefix}*: {type(error).__name__}: {error}; the files are "
                "damaged or belong to several data sets: download them again",
            ) from error
        for name, array in arrays.items():
            create_rows(files[0], name, array.shape, array.dtype)[...] = array

    def _read(self) -> dict[str, Array]:
        """Return the arrays of the file by name."""
        test = np.array((self._folder / f"{self._prefix}test.index").read_text().split(), np.int64)
        first, nodes = int(test.min()), int(test.max()) + 1
        x, y = (np.concatenate([self._rows(f"all{k}"), self._rows(f"t{k}")]) for k in "xy")
        order = np.concatenate([np.arange(first), test])
        if len(np.unique(order)) != len(x) or len(x) != len(y):
            raise ValueError(f"{len(x)} rows of features, {len(y)} of labels, {len(order)} nodes")
        features = np.zeros((nodes, x.shape[1]), np.float32)
        features[order] = x
        labels = np.full(nodes, UNLABELLED, np.int64)
        labels[order] = np.where(y.any(1), y.argmax(1), UNLABELLED)
        train = len(self._rows("y"))
        if len(self._rows("x")) != train:
            raise ValueError(f"x and y have not both {train} rows")
        edges = _edges(self._load("graph"))
        if edges.min(initial=0) < 0 or edges.max(initial=0) >= nodes:
            raise ValueError(f"an edge to node {edges.max()} of {nodes}")
        return {
            "x": features,
            "y": labels,
            "edges": edges,
            "train": np.arange(train),
            "validation": np.arange(train, min(train + VALIDATION_NODES, first)),
            "test": np.sort(test),
        }

    def _rows(self, part: str) -> Array:
        """Return the array (rows, columns) of one file."""
        value = self._load(part)
        array = value.to_array() if isinstance(value, CompressedRows) else np.asarray(value)
        if array.ndim != 2 or array.dtype.kind not in "biuf":
            raise ValueError(f"{part} is no matrix of numbers, but {array.shape} {array.dtype}")
        return array

    def _load(self, part: str) -> Any:
        path = self._folder / f"{self._prefix}{part}"
        if not path.exists():
            raise DataError(
                "import.graph-file-missing",
                f"{path} is missing: a Planetoid data set has eight files, "
                f"{self._prefix}x ... {self._prefix}test.index, in one folder",
            )
        with path.open("rb") as file:
            return RestrictedUnpickler(file, encoding="latin1").load()


def is_planetoid(source: Path) -> bool:
    """Return whether a source is a file of a Planetoid data set, or a folder of such files."""
    if source.is_dir():
        return bool(_set_names(source))
    return source.is_file() and FILES.fullmatch(source.name) is not None


def _set_names(folder: Path) -> set[str]:
    """Return the names of the data sets in a folder."""
    return {_set_name(path) for path in folder.iterdir() if FILES.fullmatch(path.name)}


def _set_name(path: Path) -> str:
    match = FILES.fullmatch(path.name)
    assert match is not None
    return match["name"]


def _edges(neighbours: Mapping[int, list[int]]) -> Array:
    """Return each edge once, (n, 2), given the neighbours of each node; loops are left out."""
    pairs = [(node, other) for node, others in neighbours.items() for other in others]
    edges: Array = np.sort(np.array(pairs, np.int64).reshape(-1, 2), axis=1)
    return np.unique(edges[edges[:, 0] != edges[:, 1]], axis=0)
