"""Data: reads depend only on the indices, orders are permutations, damage is refused."""

from __future__ import annotations

import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.data import load_data, memory_limits, source_dataset
from dtrain.data.array_source import ConcatenatedSource, LazySource, MemorySource
from dtrain.data.conversion import to_float_tensor
from dtrain.data.dataset import DatasetSplits
from dtrain.data.sampler import SHUFFLES, epoch_order, even_ranges, updates_per_epoch
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.statistics.standardise import standardise
from dtrain.data.user_data import as_splits
from dtrain.errors import ConfigError, DataError
from tests import tiny
from tests.refusals import refuses

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (300, 3, 4, 5), dtype=np.uint8)
Y = np.arange(300) % 7
FILES = {"train": "train.h5", "test": "test.h5"}


def write(path: Path, x: Any = X, y: Any = Y, **attributes: Any) -> None:
    """Write an HDF5 file with those of `x` and `y` that are not None."""
    with h5py.File(path, "w") as file:
        for key, value in (("x", x), ("y", y)):
            if value is not None:
                chunks = (32, *value.shape[1:]) if value.ndim == 4 and value.size else None
                file.create_dataset(key, data=value, chunks=chunks)
        file.attrs.update(attributes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a valid pair of files; restore the import path afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write(tmp_path / "train.h5")
    write(tmp_path / "test.h5", X[:50], Y[:50])
    return tmp_path


# Order


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 10_000])
def test_an_order_holds_every_sample_once(shuffle: str, size: int) -> None:
    assert np.array_equal(np.sort(epoch_order(size, 0, 0, shuffle)), np.arange(size))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_an_order_depends_only_on_seed_and_epoch(shuffle: str) -> None:
    first = epoch_order(10_000, 1, 2, shuffle)
    np.random.default_rng().random(3)
    assert np.array_equal(first, epoch_order(10_000, 1, 2, shuffle))
    for other in (epoch_order(10_000, 2, 1, shuffle), epoch_order(10_000, 1, 3, shuffle)):
        assert np.count_nonzero(first == other) < 50


def test_an_order_is_the_same_for_ever() -> None:
    """A resumed run under another numpy sees the same samples."""
    assert epoch_order(10, 0, 0).tolist() == [4, 2, 0, 9, 7, 1, 6, 5, 3, 8]


def test_chunks_are_read_in_long_runs() -> None:
    chunks = epoch_order(10_000, 0, 0, "chunks", chunk=100, window=4) // 100
    for start in range(0, 10_000, 400):
        assert len(np.unique(chunks[start : start + 400])) == 4
    assert not np.array_equal(chunks[:100], np.full(100, chunks[0]))


def test_unknown_shuffle() -> None:
    with refuses(ConfigError, "shuffle.unknown"):
        epoch_order(10, 0, 0, "ful")


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 128])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_even_ranges(count: int, n: int) -> None:
    ranges = even_ranges(count, n)
    assert list(itertools.chain(*ranges)) == list(range(count))
    sizes = [len(samples) for samples in ranges]
    assert len(sizes) == n
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_updates_per_epoch() -> None:
    assert [updates_per_epoch(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]


# Data sets


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with refuses(DataError, "data.scikit-learn-missing"):
        load_data("digits", {}, Path())


@pytest.mark.parametrize("in_memory", [True, False])
def test_hdf5_returns_the_written_samples(
    folder: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_dataset, "fits_in_memory", lambda size: in_memory)
    train = load_data("hdf5", FILES, folder, normalise=False).train
    assert (train.size, train.shape, train.classes) == (300, (3, 4, 5), 7)
    for indices in (RNG.permutation(300)[:128], np.array([5]), np.array([299, 0, 299]), []):
        indices = np.asarray(indices, np.int64)
        x = train.inputs(indices)
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert torch.equal(x, torch.from_numpy(X[indices]).float() / 255)
        assert torch.equal(train.targets(indices), torch.from_numpy(Y[indices]))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", "float32"), (">f4", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_floats_are_kept(folder: Path, dtype: str, expected: str) -> None:
    x = RNG.normal(size=(40, 6)).astype(dtype)
    write(folder / "train.h5", x, Y[:40])
    write(folder / "test.h5", x, Y[:40])
    inputs = load_data("hdf5", FILES, folder, normalise=False).test.inputs([3, 1])
    assert inputs.dtype == getattr(torch, expected)
    assert np.array_equal(inputs.numpy(), x[[3, 1]].astype(expected))


def test_labels_and_shape_are_known_without_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("images were read")

    monkeypatch.setattr(source_dataset, "to_float_tensor", fail)
    splits = load_data("hdf5", FILES, folder)
    assert (splits.train.shape, splits.test.classes) == ((3, 4, 5), 7)
    assert splits.train.targets([8, 0]).tolist() == [1, 0]
    with pytest.raises(AssertionError, match="images were read"):
        splits.train.inputs([0])


def test_batches_are_the_callers_own() -> None:
    x = np.ones((4, 3), np.float32)
    dataset = SourceDataset(MemorySource(x), MemorySource(np.zeros(4, np.int64)), 2)
    for indices in (range(4), [1, 2]):
        batch = dataset.inputs(indices)
        assert batch.data_ptr() % 64 == 0
        batch.zero_()
        assert x.min() == 1


# Statistics


def test_standardised_by_the_training_split(folder: Path) -> None:
    splits = load_data("hdf5", FILES, folder)
    raw = torch.from_numpy(X).double()
    mean = raw.mean((0, 2, 3), keepdim=True)
    deviation = raw.std((0, 2, 3), keepdim=True, correction=0)
    expected = ((raw - mean) / deviation).float()
    torch.testing.assert_close(splits.train.inputs(range(300)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(splits.test.inputs(range(50)), expected[:50], atol=1e-5, rtol=1e-5)


def test_statistics_of_the_file_are_used_instead_of_computed_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "train.h5", mean=[10.0, 20.0, 30.0], std=[2.0, 4.0, 0.0])
    splits = load_data("hdf5", FILES, folder)
    monkeypatch.setattr(SourceDataset, "read_stored", None)
    # A constant channel is left at scale 1, and bytes are scaled to 0 ... 1: hence 255.
    mean, deviation = (np.reshape(row, (1, 3, 1, 1)) for row in ([10, 20, 30], [2, 4, 255]))
    expected = (X[[1]].astype(float) - mean) / deviation
    inputs = splits.test.inputs([1]).numpy()
    np.testing.assert_allclose(inputs[:, :2], expected[:, :2], rtol=1e-5)
    np.testing.assert_allclose(inputs[:, 2], expected[:, 2], rtol=1e-5, atol=1e-6)


def test_constant_channels_do_not_explode() -> None:
    x = np.full((10, 2), 0.1, np.float32)
    dataset = SourceDataset(MemorySource(x), MemorySource(np.zeros(10, np.int64)), 2)
    splits = standardise(DatasetSplits(dataset, dataset))
    assert float(splits.train.inputs(range(10)).abs().max()) < 1e-6


def test_bytes_are_scaled_to_the_unit_range() -> None:
    x = to_float_tensor(np.array([0, 51, 255], np.uint8))
    assert x.tolist() == [0.0, pytest.approx(0.2), 1.0]


# Damage


DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "no x": ({"x": None}, "data.hdf5-dataset-missing"),
    "no y": ({"y": None}, "data.hdf5-dataset-missing"),
    "lengths": ({"y": Y[:299]}, "data.lengths-differ"),
    "empty": ({"x": X[:0], "y": Y[:0]}, "data.samples-empty"),
    "no pixels": ({"x": X[:, :, :0]}, "data.samples-empty"),
    "flat x": ({"x": np.zeros(300, np.float32)}, "data.samples-flat"),
    "float labels": ({"y": Y + 0.5}, "data.labels-not-integers"),
    "wide float labels": ({"y": Y.reshape(-1, 1) + 0.5}, "data.labels-not-integers"),
    "negative": ({"y": Y - 1}, "data.labels-negative"),
    "text as x": ({"x": np.full(X.shape, b"a")}, "data.samples-dtype"),
    "mean": ({"mean": [1.0], "std": [1.0]}, "data.statistics-shape"),
    "nan": ({"mean": [np.nan] * 3, "std": [1.0] * 3}, "data.statistics-invalid"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_contents(folder: Path, split: str, damage: str) -> None:
    contents, key = DAMAGES[damage]
    write(folder / f"{split}.h5", **({"x": X, "y": Y} | contents))
    with refuses(DataError, key) as caught:
        load_data("hdf5", FILES, folder)
    assert f"{split}.h5" in caught.value.message


@pytest.mark.parametrize("classes", [list("abcdef"), 6])
def test_labels_out_of_range(folder: Path, classes: object) -> None:
    write(folder / "train.h5", classes=classes)
    with refuses(DataError, "data.labels-out-of-range") as caught:
        load_data("hdf5", FILES, folder)
    assert "train.h5" in caught.value.message


def test_splits_of_other_shapes(folder: Path) -> None:
    write(folder / "test.h5", X[:, :2])
    with refuses(DataError, "data.splits-shapes-differ"):
        load_data("hdf5", FILES, folder)


def test_splits_of_other_classes(folder: Path) -> None:
    write(folder / "test.h5", X, Y + 1)
    with refuses(DataError, "data.labels-out-of-range"):
        load_data("hdf5", FILES, folder)
    write(folder / "train.h5", classes=list("abcdefg"))
    write(folder / "test.h5", classes=list("hbcdefg"))
    with refuses(DataError, "data.class-names-differ"):
        load_data("hdf5", FILES, folder)


def test_files_that_are_not_hdf5(folder: Path) -> None:
    path = folder / "train.h5"
    valid = path.read_bytes()
    for content in (b"", b"hello", valid[: len(valid) // 2]):
        path.write_bytes(content)
        with refuses(DataError, "data.file-damaged"):
            load_data("hdf5", FILES, folder)
    path.unlink()
    with refuses(DataError, "data.file-missing"):
        load_data("hdf5", FILES, folder)
    path.mkdir()
    with refuses(DataError, "data.file-missing"):
        load_data("hdf5", FILES, folder)


def test_keys_of_hdf5(folder: Path) -> None:
    with refuses(ConfigError, "data.path-invalid"):
        load_data("hdf5", {"train": "", "test": "b"}, folder)
    with refuses(ConfigError, "data.unknown"):
        load_data("hdf6", FILES, folder)
    with refuses(ConfigError, "data.no-test-split"):
        load_data("hdf5", {"train": "train.h5"}, folder)
    with refuses(ConfigError, "run-file.unknown-key"):
        load_data("hdf5", FILES | {"tset": 1}, folder)


def test_memory_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "available_bytes", lambda: 8000)
    assert memory_limits.fits_in_memory(1000)
    assert not memory_limits.fits_in_memory(1001)
    monkeypatch.setattr(memory_limits, "available_bytes", lambda: 2**50)
    assert not memory_limits.fits_in_memory(2**33)


@pytest.mark.parametrize("indices", [[0], [9, 3, 3, 0, 4], range(10), []])
def test_several_sources_are_read_as_one(indices: list[int]) -> None:
    rows = RNG.normal(size=(10, 2))
    parts = [MemorySource(rows[:4]), LazySource((0, 2), float, lambda: rows[:0], "none")]
    source = ConcatenatedSource([*parts, MemorySource(rows[4:])], "all")
    index = np.asarray(indices, np.int64)
    assert np.array_equal(source.read(index), rows[index])
    assert all(
        np.array_equal(source.read_range(*pair), rows[slice(*pair)])
        for pair in itertools.combinations_with_replacement(range(11), 2)
    )


# A user's own data


CODE = """
import numpy as np, torch
from dtrain.data.array_source import MemorySource
from dtrain.data.dataset import DatasetSplits
from dtrain.data.source_dataset import SourceDataset

def arrays(size=8):
    x = torch.arange(size * 3.0).reshape(size, 3)
    return x, torch.arange(size) % 2, x[:4].numpy(), np.array([0, 1, 1, 0])

def splits():
    x, y, *_ = arrays()
    dataset = SourceDataset(MemorySource(x.numpy()), MemorySource(y.numpy()), 2)
    return DatasetSplits(dataset, dataset)

def three(): return arrays()[:3]
def nothing(): return None
def uneven():
    x, y, *test = arrays()
    return x, y[1:], *test
def more_classes_in_test():
    x, y, *test = arrays()
    return x, y * 0, *test
def raises(): raise KeyError("my own")
"""


def test_the_example_of_the_docs(folder: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(# mydata.py.*?)^```", docs, re.M | re.S)
    [toml] = re.findall(r"^```toml\n([^`]*mydata:.*?)^```", docs, re.M | re.S)
    (folder / "mydata.py").write_text(code)
    fields = tomllib.loads(toml)["data"]
    splits = load_data(fields.pop("name"), fields, folder)
    sizes = splits.train.size, splits.test.size
    assert (sizes, splits.train.shape, splits.train.classes) == ((5000, 200), (10,), 3)


@pytest.mark.parametrize(("function", "fields"), [("arrays", {"size": 8}), ("splits", {})])
def test_a_users_function(folder: Path, function: str, fields: dict[str, object]) -> None:
    (folder / "userdata.py").write_text(CODE)
    train = load_data(f"userdata:{function}", fields, folder, normalise=False).train
    assert (train.size, train.shape, train.classes) == (8, (3,), 2)
    assert train.inputs([2, 0]).tolist() == [[6, 7, 8], [0, 1, 2]]
    assert train.targets([1, 0]).tolist() == [1, 0]
    standardised = load_data(f"userdata:{function}", fields, folder).train.inputs(range(8))
    torch.testing.assert_close(standardised.mean(0), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("function", "key"),
    [
        ("three", "data.function-result"),
        ("nothing", "data.function-result"),
        ("uneven", "data.lengths-differ"),
        ("more_classes_in_test", "data.labels-out-of-range"),
    ],
)
def test_wrong_results_of_a_users_function(folder: Path, function: str, key: str) -> None:
    (folder / "wrongdata.py").write_text(CODE)
    with refuses(DataError, key):
        load_data(f"wrongdata:{function}", {}, folder)


def test_errors_around_a_users_function(folder: Path) -> None:
    (folder / "raisingdata.py").write_text(CODE)
    with refuses(ConfigError, "run-file.unknown-key"):
        load_data("raisingdata:arrays", {"sizes": 3}, folder)
    with pytest.raises(KeyError, match="my own"):
        load_data("raisingdata:raises", {}, folder)


class Items(torch.utils.data.Dataset[tuple[object, int]]):
    """A map-style dataset over the arrays of a split."""

    def __init__(self, x: np.ndarray, y: np.ndarray, several: bool = False) -> None:
        self.x, self.y, self.several = x, y, several

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[object, int]:
        x = torch.from_numpy(self.x[index])
        return (x, x[:1]) if self.several else x, int(self.y[index])


class Stream(torch.utils.data.IterableDataset[object]):
    """A dataset without a length."""

    def __iter__(self) -> Iterator[object]:
        return iter(())


@pytest.mark.parametrize("several", [False, True])
def test_torch_datasets_are_their_items(several: bool) -> None:
    x, y, xt, yt = tiny.samples()
    train = torch.utils.data.Subset(Items(x, y, several), range(40))
    splits = as_splits((train, Items(xt, yt, several)), "data")
    arrays = as_splits((x[:40], y[:40], xt, yt), "data")
    rows = np.arange(5)
    for ours, theirs in ((splits.train, arrays.train), (splits.test, arrays.test)):
        assert (ours.size, ours.classes, ours.shape) == (theirs.size, theirs.classes, theirs.shape)
        assert torch.equal(ours.inputs(rows), theirs.inputs(rows))
        assert torch.equal(ours.targets(rows), theirs.targets(rows))
        assert len(ours.read_other_inputs(rows)) == several


def test_torch_datasets_without_pairs_or_lengths_are_refused() -> None:
    x, y, *_ = tiny.samples()
    good = Items(x, y)
    for bad, key in (
        (torch.utils.data.TensorDataset(torch.zeros(3, 2)), "data.dataset-item"),
        (Stream(), "data.iterable-dataset"),
        (torch.utils.data.ConcatDataset([good, Items(x[:, :1], y)]), "data.dataset-shapes"),
    ):
        with refuses(DataError, key):
            as_splits((bad, good), "data")
