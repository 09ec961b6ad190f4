"""Data: what is read is pure in the indices, orders are permutations, damage is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.data import hdf5, load_data
from dtrain.data import hdf5 as memory
from dtrain.data.dataset import (
    ArrayDataset,
    Dataset,
    DatasetSplits,
    moments,
    standardise,
    to_float_tensor,
)
from dtrain.data.sampler import SHUFFLES, epoch_order, even_ranges, updates_per_epoch
from dtrain.errors import ConfigError, DataError, DtrainError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (300, 3, 4, 5), dtype=np.uint8)
Y = np.arange(300) % 7
FILES = {"train": "train.h5", "test": "test.h5"}


def write(path: Path, x: Any = X, y: Any = Y, **attributes: Any) -> None:
    """Write what is not None."""
    with h5py.File(path, "w") as file:
        for key, value in (("x", x), ("y", y)):
            if value is not None:
                chunks = (32, *value.shape[1:]) if value.ndim == 4 and value.size else None
                file.create_dataset(key, data=value, chunks=chunks)
        file.attrs.update(attributes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good pair of files, first on an import path that is restored afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write(tmp_path / "train.h5")
    write(tmp_path / "test.h5", X[:50], Y[:50])
    return tmp_path


def refused(call: Callable[[], object], *words: str, code: int = DataError.code) -> None:
    with pytest.raises(DtrainError) as caught:
        call()
    assert caught.value.code == code
    for word in words:
        assert word in caught.value.message


# Order


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 10_000])
def test_an_order_holds_every_sample_once(shuffle: str, size: int) -> None:
    assert np.array_equal(np.sort(epoch_order(size, 0, 0, shuffle)), np.arange(size))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_an_order_is_pure_in_seed_and_epoch(shuffle: str) -> None:
    first = epoch_order(10_000, 1, 2, shuffle)
    np.random.default_rng().random(3)
    assert np.array_equal(first, epoch_order(10_000, 1, 2, shuffle))
    for other in (epoch_order(10_000, 2, 1, shuffle), epoch_order(10_000, 1, 3, shuffle)):
        assert np.count_nonzero(first == other) < 50


def test_an_order_is_the_same_for_ever() -> None:
    """A resumed run under another numpy sees the same samples."""
    assert epoch_order(10, 0, 0).tolist() == [4, 2, 0, 9, 7, 1, 6, 5, 3, 8]


def test_chunks_are_read_in_long_runs() -> None:
    got = epoch_order(10_000, 0, 0, "chunks", chunk=100, window=4)
    for start in range(0, 10_000, 400):
        runs = np.unique(got[start : start + 400] // 100)
        assert len(runs) == 4
    assert not np.array_equal(got[:100] // 100, np.full(100, got[0] // 100))


def test_unknown_shuffle() -> None:
    refused(lambda: epoch_order(10, 0, 0, "ful"), "did you mean 'full'", code=ConfigError.code)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 128])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_parts(count: int, n: int) -> None:
    got = even_ranges(count, n)
    assert [i for part in got for i in part] == list(range(count))
    sizes = [len(part) for part in got]
    assert len(sizes) == n
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_updates_per_epoch() -> None:
    assert [updates_per_epoch(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]


# Sources


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    refused(lambda: load_data("digits", {}, Path()), "pip install 'dtrain[demo]'")


@pytest.mark.parametrize("whole", [True, False])
def test_hdf5_gives_what_was_written(
    folder: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5, "fits_in_memory", lambda size: whole)
    train = load_data("hdf5", FILES, folder, normalise=False).train
    assert (train.size, train.shape, train.classes) == (300, (3, 4, 5), 7)
    for indices in (RNG.permutation(300)[:128], np.array([5]), np.array([299, 0, 299]), []):
        indices = np.asarray(indices, np.int64)
        got = train.inputs(indices)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert torch.equal(got, torch.from_numpy(X[indices]).float() / 255)
        assert torch.equal(train.targets(indices), torch.from_numpy(Y[indices]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("float16", "float32"), (">f4", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_floats_are_kept(folder: Path, kind: str, expected: str) -> None:
    x = RNG.normal(size=(40, 6)).astype(kind)
    write(folder / "train.h5", x, Y[:40])
    write(folder / "test.h5", x, Y[:40])
    got = load_data("hdf5", FILES, folder, normalise=False).test.inputs([3, 1])
    assert got.dtype == getattr(torch, expected)
    assert np.array_equal(got.numpy(), x[[3, 1]].astype(expected))


def test_labels_and_shape_are_known_without_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("images were read")

    monkeypatch.setattr(hdf5, "to_float_tensor", never)
    both = load_data("hdf5", FILES, folder)
    assert (both.train.shape, both.test.classes) == ((3, 4, 5), 7)
    assert both.train.targets([8, 0]).tolist() == [1, 0]
    with pytest.raises(AssertionError, match="images were read"):
        both.train.inputs([0])


def test_batches_are_the_callers_own() -> None:
    x = np.ones((4, 3), np.float32)
    source = ArrayDataset(4, (3,), 2, lambda: x, lambda: np.zeros(4, np.int64))
    for indices in (range(4), [1, 2]):
        got = source.inputs(indices)
        assert got.data_ptr() % 64 == 0
        got.zero_()
        assert x.min() == 1


# Statistics


def test_standardised_by_the_training_split(folder: Path) -> None:
    both = load_data("hdf5", FILES, folder)
    raw = torch.from_numpy(X).double()
    mean = raw.mean((0, 2, 3), keepdim=True)
    deviation = raw.std((0, 2, 3), keepdim=True, correction=0)
    expected = ((raw - mean) / deviation).float()
    torch.testing.assert_close(both.train.inputs(range(300)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.test.inputs(range(50)), expected[:50], atol=1e-5, rtol=1e-5)


def test_stated_statistics_are_used_and_nothing_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "train.h5", mean=[10.0, 20.0, 30.0], std=[2.0, 4.0, 0.0])
    both = load_data("hdf5", FILES, folder)
    monkeypatch.setattr(Dataset, "moments", None)
    expected = (X[[1]].astype(float) - np.reshape([10, 20, 30], (1, 3, 1, 1))) / np.reshape(
        [2, 4, 255], (1, 3, 1, 1)
    )
    got = both.test.inputs([1])
    np.testing.assert_allclose(got.numpy()[:, :2], expected[:, :2], rtol=1e-5)
    # A constant channel is left at scale 1, which for bytes is that of 0 ... 1.
    np.testing.assert_allclose(got.numpy()[:, 2], expected[:, 2], rtol=1e-5, atol=1e-6)


def test_moments_of_constant_and_of_shifted_channels() -> None:
    noise = RNG.normal(size=1000)
    x = np.stack([np.full(1000, 0.1), 1e8 + noise], axis=1)
    mean, deviation = moments(iter(np.split(x, [1, 300, 999])))
    assert deviation[0] == 0.0
    np.testing.assert_allclose(mean, [0.1, 1e8 + noise.mean()])
    np.testing.assert_allclose(deviation[1], noise.std(), rtol=1e-6)


def test_constant_channels_do_not_explode() -> None:
    x = np.full((10, 2), 0.1, np.float32)
    source = ArrayDataset(10, (2,), 2, lambda: x, lambda: np.zeros(10, np.int64))
    both = standardise(DatasetSplits(source, source))
    assert float(both.train.inputs(range(10)).abs().max()) < 1e-6


def test_bytes_become_shares() -> None:
    assert to_float_tensor(np.array([[0, 51, 255]], np.uint8)).tolist() == [
        [0.0, pytest.approx(0.2), 1.0]
    ]


# Damage


CHANGES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no x": ({"x": None}, ("'x'", "['y']")),
    "no y": ({"y": None}, ("'y'", "['x']")),
    "lengths": ({"y": Y[:299]}, ("300 samples", "299 labels")),
    "empty": ({"x": X[:0], "y": Y[:0]}, ("(0, 3, 4, 5)",)),
    "no pixels": ({"x": X[:, :, :0]}, ("(300, 3, 0, 5)",)),
    "flat x": ({"x": np.zeros(300, np.float32)}, ("(300,)", "channels")),
    "float labels": ({"y": Y.astype(float)}, ("float64", "integer")),
    "wide labels": ({"y": Y.reshape(-1, 1)}, ("(300, 1)",)),
    "negative": ({"y": Y - 1}, ("-1", "sample 0")),
    "int x": ({"x": X.astype(np.int32)}, ("int32", "uint8")),
    "mean": ({"mean": [1.0], "std": [1.0]}, ("(1,)", "3 numbers")),
    "nan": ({"mean": [np.nan] * 3, "std": [1.0] * 3}, ("nan", "no statistics")),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("change", CHANGES)
def test_damaged_contents(folder: Path, split: str, change: str) -> None:
    wrong, words = CHANGES[change]
    write(folder / f"{split}.h5", **({"x": X, "y": Y} | wrong))
    refused(lambda: load_data("hdf5", FILES, folder), f"{split}.h5", *words)


@pytest.mark.parametrize("classes", [list("abcdef"), 6])
def test_labels_out_of_range(folder: Path, classes: object) -> None:
    write(folder / "train.h5", classes=classes)
    refused(
        lambda: load_data("hdf5", FILES, folder), "train.h5", "label 6 at sample 6", "6 classes"
    )


def test_splits_that_do_not_fit(folder: Path) -> None:
    write(folder / "test.h5", X[:, :2])
    refused(lambda: load_data("hdf5", FILES, folder), "(3, 4, 5)", "(2, 4, 5)")
    write(folder / "test.h5", X, Y + 1)
    refused(lambda: load_data("hdf5", FILES, folder), "label 7", "7 classes")
    write(folder / "train.h5", classes=list("abcdefg"))
    write(folder / "test.h5", classes=list("hbcdefg"))
    refused(lambda: load_data("hdf5", FILES, folder), "h, b, c, ...", "a, b, c, ...")


def test_files_that_are_not_hdf5(folder: Path) -> None:
    good = (folder / "train.h5").read_bytes()
    for content in (b"", b"hello", good[: len(good) // 2]):
        (folder / "train.h5").write_bytes(content)
        refused(lambda: load_data("hdf5", FILES, folder), "train.h5", f"{len(content)} bytes")
    (folder / "train.h5").unlink()
    refused(
        lambda: load_data("hdf5", FILES, folder), "train.h5", "no such file", "dtrain data import"
    )
    (folder / "train.h5").mkdir()
    refused(lambda: load_data("hdf5", FILES, folder), "train.h5")


def test_keys_of_hdf5(folder: Path) -> None:
    refused(lambda: load_data("hdf5", {"train": "a"}, folder), "test", code=ConfigError.code)
    refused(
        lambda: load_data("hdf5", {"train": "", "test": "b"}, folder),
        "train = ''",
        code=ConfigError.code,
    )
    refused(
        lambda: load_data("hdf5", FILES | {"tset": 1}, folder),
        "'tset'",
        "'test'",
        code=ConfigError.code,
    )
    refused(lambda: load_data("hdf6", FILES, folder), "did you mean 'hdf5'", code=ConfigError.code)


def test_memory_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 8000)
    assert memory.fits_in_memory(1000)
    assert not memory.fits_in_memory(1001)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**50)
    assert not memory.fits_in_memory(2**33)


# A user's own data


CODE = """
import numpy as np, torch
from dtrain.data.dataset import ArrayDataset, DatasetSplits

def arrays(size=8):
    x = torch.arange(size * 3.0).reshape(size, 3)
    return x, torch.arange(size) % 2, x[:4].numpy(), np.array([0, 1, 1, 0])

def own():
    x, y, *_ = arrays()
    source = ArrayDataset(8, (3,), 2, x.numpy, y.numpy)
    return DatasetSplits(source, source)

def three(): return arrays()[:3]
def nothing(): return None
def uneven():
    x, y, *test = arrays()
    return x, y[1:], *test
def strange():
    x, y, *test = arrays()
    return x, y * 0, *test
def raises(): raise KeyError("my own")
"""


def test_custom_data(folder: Path) -> None:
    (folder / "mydata.py").write_text(CODE)
    for name, fields in (("arrays", {"size": 8}), ("own", {})):
        both = load_data(f"mydata:{name}", fields, folder, normalise=False)
        assert (both.train.size, both.train.shape, both.train.classes) == (8, (3,), 2)
        assert both.train.inputs([2, 0]).tolist() == [[6, 7, 8], [0, 1, 2]]
        assert both.train.targets([1, 0]).tolist() == [1, 0]
    normal = load_data("mydata:arrays", {}, folder).train.inputs(range(8))
    torch.testing.assert_close(normal.mean(0), torch.zeros(3), atol=1e-6, rtol=0)


def test_wrong_custom_data(folder: Path) -> None:
    (folder / "wrongdata.py").write_text(CODE)

    def asked(name: str, **fields: object) -> Callable[[], object]:
        return lambda: load_data(f"wrongdata:{name}", fields, folder)

    refused(asked("three"), "tuple of 3", "x_train")
    refused(asked("nothing"), "NoneType")
    refused(asked("uneven"), "8 samples", "7 labels", "train")
    refused(asked("strange"), "label 1", "test")
    refused(asked("arrays", sizes=3), "did you mean 'size'", code=ConfigError.code)
    with pytest.raises(KeyError, match="my own"):
        load_data("wrongdata:raises", {}, folder)
