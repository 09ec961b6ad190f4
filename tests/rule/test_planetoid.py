"""Planetoid: the published files as one file, without running anything of a pickle; its splits."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from dtrain.data import load_data
from dtrain.data.importing.import_data import ImportOptions, import_data
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import Task
from tests.need import lack
from tests.refusals import refuses
from tests.small_graph import IGNORED, NODES, arrays, write_graph

TEST_NODES = [9, 6, 11, 8]
"""Nodes 7 and 10 are missing: they have no edges, as in citeseer."""


class csr_matrix:  # noqa: N801 - the name in the pickle
    """A matrix with the state of SciPy's."""

    def __init__(self, array: NDArray[Any]) -> None:
        rows, columns = np.nonzero(array)
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(array)))])
        self.__dict__ |= {"_shape": array.shape, "data": array[rows, columns]}
        self.__dict__ |= {"indices": columns.astype(np.int32), "indptr": starts.astype(np.int32)}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the eight files of a graph of 12 nodes, six of them in `allx`."""
    module = ModuleType("scipy.sparse.csr")
    module.csr_matrix = csr_matrix  # type: ignore[attr-defined]
    for name in ("scipy", "scipy.sparse"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(csr_matrix, "__module__", module.__name__)
    x, y = features(10), np.eye(2, dtype=np.int32)[np.arange(10) % 2]
    neighbours = defaultdict(list, {n: [] for n in range(12)})
    neighbours |= {0: [1, 1, 9], 1: [0], 9: [0], 3: [3], 11: [5]}
    parts = {
        **{"x": csr_matrix(x[:2]), "allx": csr_matrix(x[:6]), "tx": csr_matrix(x[6:])},
        **{"y": y[:2], "ally": y[:6], "ty": y[6:], "graph": neighbours},
    }
    folder = tmp_path / "published"
    folder.mkdir()
    for name, value in parts.items():
        (folder / f"ind.toy.{name}").write_bytes(pickle.dumps(value, protocol=4))
    (folder / "ind.toy.test.index").write_text("\n".join(map(str, TEST_NODES)))
    return folder


def features(rows: int) -> NDArray[Any]:
    random = np.random.default_rng(0)
    values: NDArray[Any] = random.random((rows, 4)) * (random.random((rows, 4)) < 0.5)
    return values.astype(np.float32)


def test_the_published_split_with_nodes_in_order(published: Path, tmp_path: Path) -> None:
    [path] = import_data(published, tmp_path / "toy.h5")
    x = features(10)
    with h5py.File(path) as file:
        found = {name: file[name][()] for name in file}
    assert np.array_equal(found["x"][:6], x[:6])
    assert np.array_equal(found["x"][TEST_NODES], x[6:])
    assert not found["x"][[7, 10]].any()
    assert found["y"][TEST_NODES].tolist() == [0, 1, 0, 1]
    assert found["y"][[7, 10]].tolist() == [-1, -1]
    assert found["edges"].tolist() == [[0, 1], [0, 9], [5, 11]]
    assert [found[k].tolist() for k in ("train", "validation", "test")] == [
        [0, 1],
        [2, 3, 4, 5],
        sorted(TEST_NODES),
    ]
    [again] = import_data(published / "ind.toy.graph", tmp_path / "again.h5")
    assert again.read_bytes() == path.read_bytes()


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_of_a_pickle_is_called(published: Path, tmp_path: Path) -> None:
    for part, value in (
        ("graph", Harmful(tmp_path / "harm")),
        ("ally", np.array([[Harmful(tmp_path / "harm")]], object)),
        ("x", defaultdict(eval)),
    ):
        shutil.copytree(published, tmp_path / part)
        (tmp_path / part / f"ind.toy.{part}").write_bytes(pickle.dumps(value, protocol=4))
        with refuses(DataError, "import.pickle-refused"):
            import_data(tmp_path / part, tmp_path / "out.h5")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out.h5").exists()


def test_wrong_files_are_refused_by_key(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    with refuses(ConfigError, "import.option-unused"):
        import_data(published, out, ImportOptions(x="x"))
    (published / "ind.other.graph").write_bytes(b"")
    with refuses(ConfigError, "import.several-graphs"):
        import_data(published, out)
    whole = (published / "ind.toy.tx").read_bytes()
    for damaged in (whole[:-20], pickle.dumps([1], protocol=4)):
        (published / "ind.toy.tx").write_bytes(damaged)
        with refuses(DataError, "import.graph-damaged"):
            import_data(published / "ind.toy.x", out)
    (published / "ind.toy.tx").unlink()
    with refuses(DataError, "import.graph-file-missing"):
        import_data(published / "ind.toy.x", out)
    assert not out.exists()


def test_cora_is_what_was_published(data_dir: Path, tmp_path: Path) -> None:
    if not (data_dir / "cora").is_dir():
        lack("data", f"no folder {data_dir / 'cora'}")
    [path] = import_data(data_dir / "cora", tmp_path / "cora.h5")
    splits = load_data("planetoid", {"file": str(path)}, tmp_path, task=Task(ignore_index=IGNORED))
    sizes = {
        name: int((split.targets(np.arange(2708)) != IGNORED).sum())
        for name, split in splits.by_name().items()
    }
    assert sizes == {"train": 140, "test": 1000, "validation": 500}
    train = splits.train
    assert (train.size, train.shape, train.classes) == (2708, (1433,), 7)
    assert train.graph is not None
    assert [len(members) for members in train.graph.members] == [20] * 7
    assert train.graph.edges.shape == (2, 2 * 5278)
    assert train.inputs(np.arange(2708)).sum().item() == pytest.approx(2708, rel=1e-5)


def test_a_split_is_the_graph_with_its_own_labels(tmp_path: Path) -> None:
    path, task = write_graph(tmp_path / "small.h5"), Task(ignore_index=IGNORED)
    splits, parts = load_data("planetoid", {"file": "small.h5"}, tmp_path, task=task), arrays()
    rows = np.arange(NODES)
    for name, split in splits.by_name().items():
        y = np.full(NODES, IGNORED)
        y[parts[name]] = parts["y"][parts[name]]
        assert split.targets(rows).tolist() == y.tolist()
        x = parts["x"] / parts["x"].sum(1, keepdims=True)
        np.testing.assert_allclose(split.inputs(rows).numpy(), x, rtol=1e-6)
        assert split.read_other_inputs(rows)[0].tolist() == rows.tolist()
        assert split.graph is splits.train.graph
    plain = {"file": str(path), "scale_nodes": False}
    standard = load_data("planetoid", plain, tmp_path, task=task).train.inputs(rows)
    np.testing.assert_allclose(standard.mean(0).numpy(), 0, atol=1e-6)


def test_damaged_files_and_tasks_without_a_mask_are_refused(tmp_path: Path) -> None:
    task, fields = Task(ignore_index=IGNORED), {"file": "small.h5"}
    write_graph(tmp_path / "small.h5", edges=np.array([[0, NODES]]))
    with refuses(ConfigError, "data.no-ignored-label"):
        load_data("planetoid", fields, tmp_path)
    with refuses(DataError, "data.graph-damaged"):
        load_data("planetoid", fields, tmp_path, task=task)
    with h5py.File(tmp_path / "small.h5", "a") as file:
        del file["test"]
    with refuses(DataError, "data.hdf5-dataset-missing"):
        load_data("planetoid", fields, tmp_path, task=task)
