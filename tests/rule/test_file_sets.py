"""Data in files: every format gives the arrays that were written, and names what does not fit."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dtrain import Run, data
from dtrain.data import load_data
from dtrain.data.array_source import ArraySource
from dtrain.data.formats.hdf5_source import Hdf5Source
from dtrain.data.formats.idx_set import open_idx
from dtrain.data.formats.npy_source import open_npy, open_npz_array
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import Task
from tests.refusals import refuses

RNG = np.random.default_rng(0)
ROWS = 37
X = RNG.integers(0, 256, (ROWS, 3, 4), dtype=np.uint8)
Y = np.arange(ROWS) % 5


def load(name: str, folder: Path, *, task: Task | None = None, **keys: Any) -> Any:
    """Open a data set without standardisation."""
    options = {} if task is None else {"task": task}
    validation = keys.pop("validation", 0.0)
    return load_data(name, keys, folder, normalise=False, validation=validation, **options)


def write_hdf5(path: Path, attributes: dict[str, Any] | None = None, **arrays: Any) -> None:
    """Write an HDF5 file; `__` in a name is a group."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name.replace("__", "/")] = array
        file.attrs.update(attributes or {})


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an IDX file, compressed where it is called so."""
    kinds = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
    head = struct.pack(">HBB", 0, kinds[array.dtype.str[1:]], array.ndim)
    head += struct.pack(f">{array.ndim}I", *array.shape)
    content = head + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


# Sources: a read at any indices gives the rows of the array


def hdf5_source(x: np.ndarray, folder: Path, **options: Any) -> ArraySource:
    """Return the source of a data set that was written."""
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("group/x", data=x, **options)
    return Hdf5Source(folder / "a.h5", "group/x")


def npy_source(x: np.ndarray, folder: Path) -> ArraySource:
    np.save(folder / "a.npy", x)
    return open_npy(folder / "a.npy")


def npz_source(x: np.ndarray, folder: Path, save: Callable[..., None] = np.savez) -> ArraySource:
    save(folder / "a.npz", other=Y, x=x)
    return open_npz_array(folder / "a.npz", "x")


def idx_source(x: np.ndarray, folder: Path, name: str = "a-idx3-ubyte") -> ArraySource:
    write_idx(folder / name, x)
    return open_idx(folder / name)


SOURCES: dict[str, Callable[[np.ndarray, Path], ArraySource]] = {
    "hdf5 contiguous": hdf5_source,
    "hdf5 chunks": lambda x, f: hdf5_source(x, f, chunks=(8, *x.shape[1:])),
    "hdf5 one row": lambda x, f: hdf5_source(x, f, chunks=(1, *x.shape[1:])),
    "hdf5 one chunk": lambda x, f: hdf5_source(x, f, chunks=(64, 1, 4), maxshape=(64, 1, 4)),
    "hdf5 cut rows": lambda x, f: hdf5_source(x, f, chunks=(8, 1, 3)),
    "hdf5 compressed": lambda x, f: hdf5_source(x, f, chunks=(8, 1, 4), compression="gzip"),
    "hdf5 checksums": lambda x, f: hdf5_source(x, f, chunks=(8, 1, 4), fletcher32=True),
    "npy": npy_source,
    "npy fortran": lambda x, f: npy_source(np.asfortranarray(x), f),
    "npz": npz_source,
    "npz fortran": lambda x, f: npz_source(np.asfortranarray(x), f),
    "npz compressed": lambda x, f: npz_source(x, f, np.savez_compressed),
    "idx": idx_source,
    "idx gz": lambda x, f: idx_source(x, f, "a-idx3-ubyte.gz"),
}
ORDERS = {
    "shuffled": RNG.permutation(ROWS),
    "ascending": np.arange(3, 30),
    "descending": np.arange(ROWS)[::-1],
    "with gaps": np.arange(0, ROWS, 5),
    "repeated": np.array([36, 0, 36, 36, 7, 8, 7]),
    "one": np.array([36]),
    "none": np.array([], np.int64),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_read_gives_the_rows_of_the_array(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](X[:, :1], tmp_path)
    x = X[:, :1].reshape(source.shape)
    assert (len(source), source.dtype) == (ROWS, x.dtype)
    copy = pickle.loads(pickle.dumps(source))
    for order in ORDERS.values():
        rows = source.read(order)
        assert np.array_equal(rows, x[order])
        assert rows.flags.writeable
        assert np.array_equal(copy.read(order), x[order])
    for start, stop in ((0, ROWS), (5, 20), (36, 37)):
        assert np.array_equal(source.read_range(start, stop), x[start:stop])
    assert len(pickle.dumps(source)) < 1000
    source.close()
    assert np.array_equal(source.read([4]), x[[4]])


def test_several_threads_read_one_source(tmp_path: Path) -> None:
    source = hdf5_source(X, tmp_path, chunks=(8, 3, 4))
    orders = [RNG.permutation(ROWS) for _ in range(40)]
    with ThreadPoolExecutor(4) as threads:
        for order, rows in zip(orders, threads.map(source.read, orders), strict=True):
            assert np.array_equal(rows, X[order])


@pytest.mark.parametrize("chunks", [(1, 2, 2, 2), (8, 2, 2, 2), None])
def test_chunks_that_were_never_written_are_the_fill_value(
    chunks: tuple[int, ...] | None, tmp_path: Path
) -> None:
    """As in the case `volumes`, where none was."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        x = file.create_dataset("x", (30, 2, 2, 2), "float32", chunks=chunks, fillvalue=7)
        if chunks is not None:
            x[3], x[20:22] = 1, 2
        expected = x[:]
    source = Hdf5Source(tmp_path / "a.h5", "x")
    assert np.array_equal(source.read(np.arange(30)[::-1]), expected[::-1])
    assert np.array_equal(source.read_range(2, 22), expected[2:22])


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    source = hdf5_source(X, tmp_path)
    for index in (-1, ROWS):
        with pytest.raises(IndexError):
            source.read([0, index])
    with h5py.File(tmp_path / "a.h5") as file:
        offset = file["group/x"].id.get_offset()
    source.read([0])
    os.truncate(tmp_path / "a.h5", offset + X[:5].nbytes)
    assert np.array_equal(source.read([4]), X[[4]])
    with refuses(DataError, "data.file-damaged"):
        source.read([4, 5])


def test_a_file_is_read_while_the_process_has_it_open(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5", x=X, y=Y)
    with h5py.File(tmp_path / "a.h5"):
        assert load("hdf5", tmp_path, train="a.h5", test="a.h5").train.size == ROWS


DTYPES = ("?", *"bBhHiIqQefdg", "F", "D", "G")


@pytest.mark.parametrize(
    ("code", "order"),
    [(code, o) for code in DTYPES for o in "<>" if o == "<" or np.dtype(code).itemsize > 1],
)
def test_every_dtype_is_read_as_it_is_stored(code: str, order: str, tmp_path: Path) -> None:
    dtype = np.dtype(code).newbyteorder(order)
    x = RNG.integers(0, 2 if code == "?" else 100, (9, 3)).astype(dtype)
    if dtype.kind == "c":
        x += 1j
    write_hdf5(tmp_path / "a.h5", x=x, y=Y[:9])
    np.savez(tmp_path / "a.npz", x=x, y=Y[:9])
    expected = x.astype({"c": "c16" if x.real.itemsize > 4 else "c8"}.get(dtype.kind, "f8"))
    expected = expected / 255 if dtype == np.uint8 else expected
    for name, suffix in (("hdf5", "h5"), ("npz", "npz")):
        if (name, code, order) == ("hdf5", "G", ">"):
            continue  # h5py writes its bytes in the wrong order
        train = load(name, tmp_path, train=f"a.{suffix}", test=f"a.{suffix}").train
        inputs = train.inputs([8, 0])
        np.testing.assert_allclose(inputs.numpy(), expected[[8, 0]], rtol=1e-6)
        assert inputs.is_complex() == (dtype.kind == "c")
        if dtype.kind in "biu":
            integers = train.integer_inputs([8, 0])
            assert integers.dtype == torch.int64
            assert np.array_equal(integers.numpy(), x[[8, 0]].astype(np.int64))


def test_sixteen_bits_are_trained_on_as_they_are(tmp_path: Path) -> None:
    """The case `sixteen_bits`: counts of a detector, up to 65,535."""
    x = np.linspace(0, 65535, 40).reshape(20, 2).astype(np.uint16)
    np.savez(tmp_path / "a.npz", x=x, y=Y[:20])
    train = load("npz", tmp_path, train="a.npz", test="a.npz").train
    assert np.array_equal(train.inputs(range(20)).numpy(), x.astype(np.float32))


# Which files and names


def contents(split: Any) -> tuple[np.ndarray, list[int]]:
    """Return all stored samples and labels of a split."""
    rows = np.arange(split.size)
    return split.integer_inputs(rows).numpy(), split.targets(rows).tolist()


def check(split: Any, rows: Any) -> None:
    """Assert that a split has these rows of `X` and `Y`."""
    x, y = contents(split)
    assert np.array_equal(x.reshape(len(x), -1), X[rows].reshape(len(x), -1))
    assert y == Y[rows].tolist()


TRAIN, TEST, VALID = slice(0, 20), slice(20, 30), slice(30, 37)
NAMES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "named": (
        {**{"x": "train/images", "y": "train/labels"}, "test_x": "test/images"}
        | {"test_y": "test/labels", "validation_x": "other/i", "validation_y": "other/l"},
        ("train/images", "train/labels", "test/images", "test/labels", "other/i", "other/l"),
    ),
    "by the names of training": (
        {"x": "train/images", "y": "Train/labels", "validation_x": "val/images"},
        ("train/images", "Train/labels", "test/images", "Test/labels", "val/images", "Val/labels"),
    ),
    "usual": (
        {"validation_x": "x_val", "validation_y": "y_val"},
        ("x_train", "y_train", "x_test", "y_test", "x_val", "y_val"),
    ),
    "usual, in groups": (
        {"validation_x": "valid/x"},
        ("train/x", "train/y", "test/x", "test/y", "valid/x", "valid/y"),
    ),
}


@pytest.mark.parametrize("name", ["hdf5", "npz"])
@pytest.mark.parametrize("case", NAMES)
def test_one_file_holds_all_splits(case: str, name: str, tmp_path: Path) -> None:
    """The case `named`, and others."""
    keys, names = NAMES[case]
    arrays = [a[rows] for rows in (TRAIN, TEST, VALID) for a in (X, Y)]
    pairs = dict(zip(names, arrays, strict=True))
    if name == "npz":
        np.savez(tmp_path / "all", **pairs)
    else:
        write_hdf5(tmp_path / "all", **pairs)
    path = "all.npz" if name == "npz" else "all"
    splits = load(name, tmp_path, train=path, **keys)
    for split, rows in zip(("train", "test", "validation"), (TRAIN, TEST, VALID), strict=True):
        check(splits.by_name()[split], rows)


SUFFIXES = {
    **{"hdf5": ".h5", "npz": ".npz", "npy": ".npy", "csv": ".csv"},
    "idx": "-images-idx3-ubyte",
}


def write_parts(name: str, folder: Path, parts: dict[str, slice]) -> None:
    """Write a file per part."""
    for part, rows in parts.items():
        x, y = X[rows], Y[rows]
        if name == "hdf5":
            write_hdf5(folder / f"{part}.h5", x=x, y=y)
        elif name == "npz":
            np.savez(folder / f"{part}.npz", x=x, y=y)
        elif name == "npy":
            np.save(folder / f"{part}.npy", x)
            np.save(folder / f"y-{part}.npy", y)
        elif name == "idx":
            write_idx(folder / f"{part}-images-idx3-ubyte", x)
            write_idx(folder / f"{part}-labels-idx1-ubyte", y.astype(np.uint8))
        else:
            table = np.column_stack([x.reshape(len(x), -1), y])
            header = ",".join([*(f"p{i}" for i in range(12)), "class"])
            np.savetxt(folder / f"{part}.csv", table, "%d", ",", header=header, comments="")


@pytest.mark.parametrize("name", ["hdf5", "npz", "npy", "idx", "csv"])
@pytest.mark.parametrize("many", ["one", "list", "pattern"])
def test_files_of_each_split(
    many: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"part-2": slice(0, 8), "part-10": slice(8, 20), "test": TEST, "valid": VALID}
    write_parts(name, tmp_path, parts | {"train": TRAIN})
    suffix = SUFFIXES[name]
    monkeypatch.setenv("HERE", str(tmp_path))
    train = {
        "one": f"$HERE/train{suffix}",
        "list": (f"part-2{suffix}", f"${{HERE}}/part-10{suffix}"),
        "pattern": f"part-*{suffix}",
    }[many]
    keys: dict[str, Any] = {"train": train, "test": f"test{suffix}"}
    if name == "npy":
        train_y = "y-train.npy" if many == "one" else "y-part-*.npy"
        keys |= {"train_y": train_y, "test_y": "y-test.npy", "validation_y": "y-valid.npy"}
    kind = "npz" if name == "npy" else name
    splits = load(kind, tmp_path, **keys, validation=f"valid{suffix}")
    for split, rows in zip(("train", "test", "validation"), (TRAIN, TEST, VALID), strict=True):
        check(splits.by_name()[split], rows)
    assert splits.train.shape == {"idx": (1, 3, 4), "csv": (12,)}.get(name, (3, 4))


@pytest.mark.parametrize("name", ["hdf5", "csv"])
def test_a_share_is_the_test_split(name: str, tmp_path: Path) -> None:
    write_parts(name, tmp_path, {"all": slice(0, ROWS)})
    path = f"all{SUFFIXES[name]}"
    splits = load(name, tmp_path, train=path, test=0.3, validation=0.25)
    again = load_data(name, {"train": path, "test": 0.3}, tmp_path, normalise=False, seed=1)
    sizes = {split: part.size for split, part in splits.by_name().items()}
    assert sizes == {"train": 20, "test": 11, "validation": 6}
    assert contents(splits.test)[1] == contents(again.test)[1]
    rows = [contents(part)[0].reshape(part.size, -1) for part in splits.by_name().values()]
    assert {*map(bytes, np.concatenate(rows).astype(np.uint8))} == {
        *map(bytes, X.reshape(ROWS, -1))
    }
    for share in (0.0, 1.0, 2.5):
        with refuses(ConfigError, "data.test-no-share"):
            load(name, tmp_path, train=path, test=share)
    with refuses(DataError, "data.test-empty"):
        load(name, tmp_path, train=path, test=0.001)


@pytest.mark.parametrize("compressed", [True, False])
def test_the_folder_of_mnist(compressed: bool, tmp_path: Path) -> None:
    suffix = ".gz" if compressed else ""
    for split, rows in (("train", TRAIN), ("t10k", TEST)):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", X[rows])
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", Y[rows].astype(np.uint8))
    splits = load("idx", tmp_path, train=".")
    check(splits.train, TRAIN)
    check(splits.test, TEST)
    assert load("idx", tmp_path, train=".", task=Task("mse", target="input")).test.size == 10
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with refuses(ConfigError, "data.no-target-files"):
        load("idx", tmp_path, train=".")
    (tmp_path / f"t10k-images-idx3-ubyte{suffix}").unlink()
    with refuses(DataError, "data.idx-files"):
        load("idx", tmp_path, train=".")


@pytest.mark.parametrize("name", ["hdf5", "npz"])
def test_several_inputs(name: str, tmp_path: Path) -> None:
    mask = RNG.random((ROWS, 5)) > 0.5
    write_hdf5(tmp_path / "a.h5", x=X, images=X, meta=mask, y=Y)
    np.savez(tmp_path / "a.npz", x=X, images=X, meta=mask, y=Y)
    path = "a.h5" if name == "hdf5" else "a.npz"
    train = load(name, tmp_path, train=path, test=path, x=("images", "meta")).train
    check(train, slice(None))
    assert np.array_equal(train.read_other_inputs([3, 1])[0].numpy(), mask[[3, 1]])


def test_links_lead_to_other_files(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "other.h5", inner__x=X, inner__y=Y)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = h5py.ExternalLink("other.h5", "/inner/x")
        file["group"] = h5py.ExternalLink("other.h5", "/inner")
        file["y"] = h5py.SoftLink("/group/y")
    check(load("hdf5", tmp_path, train="a.h5", test="a.h5").train, slice(None))
    check(load("hdf5", tmp_path, train="a.h5", test="a.h5", x="group/x").train, slice(None))
    (tmp_path / "other.h5").unlink()
    for x in ("x", "group/x"):
        with refuses(DataError, "data.hdf5-part-missing") as caught:
            load("hdf5", tmp_path, train="a.h5", test="a.h5", x=x)
        assert "other.h5" in caught.value.message


def test_statistics_of_several_files_count_only_if_they_are_equal(tmp_path: Path) -> None:
    x = X[:10].astype(np.float32)
    for part, mean in (("a", 5.0), ("b", 5.0), ("c", 6.0)):
        attributes = {"mean": [mean] * 3, "std": [2.0] * 3}
        write_hdf5(tmp_path / f"{part}.h5", attributes, x=x, y=Y[:10])
    equal = load_data("hdf5", {"train": ("a.h5", "b.h5"), "test": "a.h5"}, tmp_path).train
    torch.testing.assert_close(equal.inputs([0]), (torch.from_numpy(x[:1]) - 5) / 2)
    unequal = load_data("hdf5", {"train": ("a.h5", "c.h5"), "test": "a.h5"}, tmp_path).train
    assert abs(float(unequal.inputs(range(20)).mean())) < 1e-5


# Refusals


def wrong(folder: Path) -> None:
    """Write the files of the cases below."""
    write_hdf5(folder / "a.h5", {"classes": list("abcde")}, x=X, y=Y, group__pictures=X, text=b"a")
    write_hdf5(folder / "shape.h5", {"classes": list("abcde")}, x=X[:, :2], y=Y)
    write_hdf5(folder / "dtype.h5", {"classes": list("abcde")}, x=X.astype("i4"), y=Y)
    write_hdf5(folder / "classes.h5", {"classes": list("abcdf")}, x=X, y=Y)
    write_hdf5(folder / "short.h5", {"classes": list("abcde")}, x=X, y=Y[1:])
    records = np.zeros(ROWS, [("a", "i4"), ("b", "f4")])
    write_hdf5(folder / "kinds.h5", y=Y, words=np.full((ROWS, 2), b"abc"), records=records[:, None])
    np.savez(folder / "a.npz", x=X, y=Y, one=np.float32(1), objects=np.array([{}] * ROWS))
    np.save(folder / "x.npy", X)
    np.save(folder / "y.npy", Y)
    np.save(folder / "objects.npy", np.array([[{}]] * ROWS))
    (folder / "cut.npy").write_bytes((folder / "x.npy").read_bytes()[:-1])
    (folder / "cut.npz").write_bytes((folder / "a.npz").read_bytes()[:-100])
    write_idx(folder / "x-images-idx3", X)
    write_idx(folder / "x-labels-idx1", Y.astype(np.uint8))
    (folder / "cut-idx3").write_bytes((folder / "x-images-idx3").read_bytes()[:-1])
    (folder / "text-idx3").write_text("hello")
    (folder / "cut-idx3.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x25ab"))


H5, NPY = {"test": "a.h5"}, {"test": 0.2, "train_y": "y.npy"}
REFUSALS: dict[str, tuple[str, dict[str, Any], type, str]] = {
    "shape": ("hdf5", H5 | {"train": ("a.h5", "shape.h5")}, DataError, "data.parts-differ"),
    "dtype": ("hdf5", H5 | {"train": ("a.h5", "dtype.h5")}, DataError, "data.parts-differ"),
    "classes": (
        *("hdf5", H5 | {"train": ("a.h5", "classes.h5")}, DataError),
        "data.class-names-differ",
    ),
    "short part": ("hdf5", H5 | {"train": ("a.h5", "short.h5")}, DataError, "data.lengths-differ"),
    "pattern": ("hdf5", H5 | {"train": "part-*.h5"}, DataError, "data.no-match"),
    "variable": ("hdf5", H5 | {"train": "$NOT_SET/a.h5"}, ConfigError, "data.variable-unset"),
    "no list": ("hdf5", H5 | {"train": ()}, ConfigError, "data.path-invalid"),
    "no path": ("hdf5", H5 | {"train": 3}, ConfigError, "data.path-invalid"),
    "no names": ("hdf5", H5 | {"train": "a.h5", "x": ()}, ConfigError, "data.no-names"),
    "name": ("hdf5", H5 | {"train": "a.h5", "x": 3}, ConfigError, "run-file.wrong-type"),
    "a group": (
        *("hdf5", H5 | {"train": "a.h5", "x": "group"}, DataError),
        "data.hdf5-dataset-missing",
    ),
    "no test": ("hdf5", {"train": "a.h5"}, ConfigError, "data.no-test-split"),
    "test-x wrong": (
        *("hdf5", {"train": "a.h5", "test_x": "group/picture", "test_y": "x"}, DataError),
        "data.hdf5-dataset-missing",
    ),
    "test-x alone": (
        *("hdf5", {"train": "a.h5", "test_x": "group/pictures"}, ConfigError),
        "data.names-of-training",
    ),
    "words": (
        "hdf5",
        {"train": "kinds.h5", "test": 0.2, "x": "words"},
        DataError,
        "data.samples-dtype",
    ),
    "records": (
        *("hdf5", {"train": "kinds.h5", "test": 0.2, "x": "records"}, DataError),
        "data.samples-dtype",
    ),
    "record targets": (
        *("hdf5", {"train": "kinds.h5", "test": 0.2, "x": "words", "y": "records"}, DataError),
        "data.samples-dtype",
    ),
    "key": ("hdf5", H5 | {"train": "a.h5", "target": "y"}, ConfigError, "run-file.unknown-key"),
    "npz name": ("npz", {"train": "a.npz", "test": 0.2, "x": "z"}, DataError, "data.array-missing"),
    "npz test": ("npz", {"train": "a.npz"}, ConfigError, "data.no-test-split"),
    "npz number": (
        *("npz", {"train": "a.npz", "test": 0.2, "x": "one"}, DataError),
        "data.single-number",
    ),
    "npz objects": (
        "npz",
        {"train": "a.npz", "test": 0.2, "y": "objects"},
        DataError,
        "data.objects",
    ),
    "npz missing": ("npz", {"train": "no.npz", "test": 0.2}, DataError, "data.file-missing"),
    "npz cut": ("npz", {"train": "cut.npz", "test": 0.2}, DataError, "data.file-damaged"),
    "npy objects": ("npz", NPY | {"train": "objects.npy"}, DataError, "data.objects"),
    "npy cut": ("npz", NPY | {"train": "cut.npy"}, DataError, "data.file-damaged"),
    "npy missing": ("npz", NPY | {"train": "no.npy"}, DataError, "data.file-missing"),
    "npy no targets": ("npz", {"train": "x.npy", "test": 0.2}, ConfigError, "data.no-target-files"),
    "npy targets": (
        *("npz", {"train": ("x.npy", "x.npy"), "train_y": "y.npy", "test": 0.2}, ConfigError),
        "data.target-files",
    ),
    "npy test": ("npz", {"train": "x.npy", "train_y": "y.npy"}, ConfigError, "data.no-test-split"),
    "npy names": ("npz", NPY | {"train": "x.npy", "x": "images"}, ConfigError, "data.names-of-npy"),
    "idx test": ("idx", {"train": "x-images-idx3"}, ConfigError, "data.no-test-split"),
    "idx targets": ("idx", {"train": "cut-idx3", "test": 0.2}, ConfigError, "data.no-target-files"),
    "idx cut": (
        *("idx", {"train": "cut-idx3", "train_y": "x-labels-idx1", "test": 0.2}, DataError),
        "data.file-damaged",
    ),
    "idx text": (
        *("idx", {"train": "text-idx3", "train_y": "x-labels-idx1", "test": 0.2}, DataError),
        "data.file-damaged",
    ),
    "idx labels cut": (
        *("idx", {"train": "x-images-idx3", "train_y": "cut-idx3.gz", "test": 0.2}, DataError),
        "data.file-damaged",
    ),
    "idx missing": (
        *("idx", {"train": "no", "train_y": "x-labels-idx1", "test": 0.2}, DataError),
        "data.file-missing",
    ),
}


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with files that do not fit."""
    folder = tmp_path_factory.mktemp("wrong")
    wrong(folder)
    return folder


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused(case: str, wrong_files: Path) -> None:
    name, keys, kind, key = REFUSALS[case]
    with refuses(kind, key) as caught:
        load(name, wrong_files, **keys)
    if isinstance(keys["train"], tuple) and kind is DataError:
        assert keys["train"][1] in caught.value.message


@pytest.mark.parametrize("name", ["hdf5", "npz"])
def test_a_wrong_name_lists_the_names_that_are_there(name: str, tmp_path: Path) -> None:
    arrays = {f"group/a{i}": X[:, i % 3] for i in range(11)} | {"group/images": X}
    write_hdf5(tmp_path / "a.h5", **arrays)
    np.savez(tmp_path / "a.npz", **arrays)
    path = "a.h5" if name == "hdf5" else "a.npz"
    with pytest.raises(DataError) as caught:
        load(name, tmp_path, train=path, test=0.2, x="image")
    assert "group/images" in caught.value.message  # the closest one
    assert sum(f"group/a{i} " in caught.value.message for i in range(11)) == 8
    assert "(37, 4)" in caught.value.message


# Run files


TABLES_OF_DATA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hdf5": (
        data.hdf5([Path("a.h5"), "b.h5"], x=("p", "q"), test_x="r", normalise=False),
        {"train": ["a.h5", "b.h5"], "x": ["p", "q"], "test-x": "r", "normalise": False},
    ),
    "npz": (
        data.npz("x.npy", "z.npy", train_y=Path("y.npy"), validation=["v.npy"]),
        {"train": "x.npy", "test": "z.npy", "train-y": "y.npy", "validation": ["v.npy"]},
    ),
    "csv": (
        data.csv("$D/a.csv", 0.2, target=-1, features=[0, "b"], delimiter=";"),
        {"train": "$D/a.csv", "test": 0.2, "target": -1, "features": [0, "b"], "delimiter": ";"},
    ),
    "idx": (data.idx("~/mnist"), {"train": "~/mnist"}),
}


@pytest.mark.parametrize("name", TABLES_OF_DATA)
def test_keys_from_python_are_those_of_a_resolved_run_file(name: str, tmp_path: Path) -> None:
    made, expected = TABLES_OF_DATA[name]
    run = Run(model="mlp", data=made, optimizer={"name": "sgd"}, epochs=1, path=tmp_path / "a.toml")
    (tmp_path / "run.toml").write_text(run.to_toml())
    again = Run.read(tmp_path / "run.toml")
    assert again.to_toml() == run.to_toml()
    written = tomllib.loads(run.to_toml())["data"]
    assert {key: written[key] for key in expected} == expected


# CSV


def write_csv(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n")


def table(splits: Any, split: str = "train") -> list[list[float]]:
    """Return the samples of a split."""
    part = splits.by_name()[split]
    return part.inputs(range(part.size)).tolist()  # type: ignore[no-any-return]


CSV = ("a,b,class", "1.5,2,red", "3,4,blue", "5,6,red")
TABLES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (CSV, {}),
    "no header": (CSV[1:], {}),
    "semicolons": (tuple(line.replace(",", ";") for line in CSV), {}),
    "tabs": (tuple(line.replace(",", "\t") for line in CSV), {"delimiter": "\t"}),
    "quotes": (('"a","b","class, or kind"', '"1.5",2," red"', '"3",4,blue', "5,6,red"), {}),
    "blank lines": ((*CSV[:2], "", *CSV[2:], ""), {}),
    "another column": (("class,a,b", "red,1.5,2", "blue,3,4", "red,5,6"), {"target": "class"}),
    "by number": (("class,a,b", "red,1.5,2", "blue,3,4", "red,5,6"), {"target": -3}),
    "features": (
        ("id,b,a,class", "u,2,1.5,red", "v,4,3,blue", "w,6,5,red"),
        {"features": ("a", 1)},
    ),
    "mark": ((f"\ufeff{CSV[0]}", *CSV[1:]), {"features": ("a", "b")}),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(case: str, tmp_path: Path) -> None:
    lines, keys = TABLES[case]
    write_csv(tmp_path / "a.csv", *lines)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    splits = load("csv", tmp_path, train="a.csv", test="b.csv.gz", **keys)
    for split in ("train", "test"):
        assert table(splits, split) == [[1.5, 2], [3, 4], [5, 6]]
        assert splits.by_name()[split].targets(range(3)).tolist() == [1, 0, 1]
    assert splits.train.classes == 2


def test_columns_are_found_by_their_names_in_every_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", *CSV)
    write_csv(tmp_path / "b.csv", "class,b,other,a", "blue,2,x,1")
    assert table(load("csv", tmp_path, train="a.csv", test="b.csv"), "test") == [[1, 2]]
    write_csv(tmp_path / "b.csv", "class,b,other", "blue,2,3")
    with refuses(DataError, "data.csv-columns"):
        load("csv", tmp_path, train="a.csv", test="b.csv")


TARGETS: dict[str, tuple[str, str, str | None, Any]] = {
    "labels": ("1", "0", None, torch.tensor([1])),
    "labels with a point": ("1.0", "0", None, torch.tensor([1])),
    "fractions": ("1.5", "2", "mse", torch.tensor([[1.5]], dtype=torch.float64)),
    "fractions in test alone": ("1", "2.5", "mse", torch.tensor([[1.0]], dtype=torch.float64)),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_of_tables(case: str, tmp_path: Path) -> None:
    train, test, loss, expected = TARGETS[case]
    write_csv(tmp_path / "a.csv", f"1,2,{train}")
    write_csv(tmp_path / "b.csv", f"1,2,{test}")
    task = None if loss is None else Task(loss)
    splits = load("csv", tmp_path, train="a.csv", test="b.csv", task=task)
    target = splits.train.targets([0])
    assert torch.equal(target, expected)
    assert target.dtype == expected.dtype == splits.test.targets([0]).dtype


def test_integers_of_tables_stay_integers(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", "7,8,0", "9,10,1")
    write_csv(tmp_path / "b.csv", "0.5,8,0")
    integers = load("csv", tmp_path, train="a.csv", test="a.csv").train
    assert integers.integer_inputs([1]).tolist() == [[9, 10]]
    real = load("csv", tmp_path, train="a.csv", test="b.csv")
    assert real.train.input_dtype == real.test.input_dtype == torch.float64


def test_several_targets_and_none(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", "a,b,c", "1,2.5,3", "4,5,6")
    both = load("csv", tmp_path, train="a.csv", test=0.5, target=("b", "c"), task=Task("mse"))
    assert both.train.shape == (1,)
    assert both.train.target_shape == (2,)
    none = load("csv", tmp_path, train="a.csv", test="a.csv", task=Task("mse", target="input"))
    assert table(none) == [[1, 2.5, 3], [4, 5, 6]]


CSV_REFUSALS: dict[str, tuple[tuple[str, ...], dict[str, Any], type, str, str]] = {
    "empty field": (
        ("a,b,c", "1,2,0", "1,,1"),
        {},
        DataError,
        "data.csv-field",
        "line 3, column 'b'",
    ),
    "no number": (("1,2,0", "", "1,x,1"), {}, DataError, "data.csv-field", "line 3, column 1"),
    "no target": (("a,b", "1,u", "2,"), {}, DataError, "data.csv-field", "line 3, column 'b'"),
    "text among numbers": (("1,0", "2,u"), {}, DataError, "data.csv-field", "line 2, column 1"),
    "short line": (("1,2,0", "1,0"), {}, DataError, "data.csv-columns", "line 2"),
    "long line": (("1,2,0", "1,2,3,0"), {}, DataError, "data.csv-columns", "line 2"),
    "column": (CSV, {"target": "clas"}, ConfigError, "data.no-column", "'class'"),
    "twice": (("a,a,c", "1,2,0"), {"target": "a"}, ConfigError, "data.no-column", "2"),
    "number": (CSV, {"target": 3}, ConfigError, "data.no-column", "0 to 2"),
    "both": (CSV, {"target": "a", "features": ("a",)}, ConfigError, "data.features", ""),
    "delimiter": (CSV, {"delimiter": ",,"}, ConfigError, "data.delimiter", ""),
    "real labels": (("1,2.5", "2,3"), {}, DataError, "data.labels-not-integers", ""),
    "empty": ((), {}, DataError, "data.csv-empty", ""),
    "header alone": (("a,b",), {}, DataError, "data.samples-empty", ""),
}


@pytest.mark.parametrize("case", CSV_REFUSALS)
def test_mistakes_in_tables_are_located(case: str, tmp_path: Path) -> None:
    lines, keys, kind, key, text = CSV_REFUSALS[case]
    write_csv(tmp_path / "a.csv", *lines)
    if case == "empty":
        (tmp_path / "a.csv").write_text("")
    with refuses(kind, key) as caught:
        load("csv", tmp_path, train="a.csv", test="a.csv", **keys)
    assert text in caught.value.message


def test_classes_of_tables(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", "1,red", "2,blue")
    write_csv(tmp_path / "b.csv", "3,green")
    both = load("csv", tmp_path, train=("a.csv", "b.csv"), test="b.csv")
    assert both.train.targets(range(3)).tolist() == [2, 0, 1]
    assert both.test.targets([0]).tolist() == [1]
    with refuses(DataError, "data.class-unknown"):
        load("csv", tmp_path, train="a.csv", test="b.csv")
    with refuses(DataError, "data.csv-text-targets"):
        load("csv", tmp_path, train="a.csv", test="b.csv", task=Task("mse"))
    with refuses(ConfigError, "data.no-test-split"):
        load("csv", tmp_path, train="a.csv")
