"""`dtrain data describe`, `stats` and `rechunk`: figures of files and runs, and faithful copies."""

from __future__ import annotations

import itertools
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dtrain.cli import main
from dtrain.config.parse import read_run
from dtrain.data import load_data
from dtrain.data.formats import hdf5_pieces, hdf5_writer
from dtrain.data.importing.import_data import ImportOptions
from dtrain.data.tools import rechunk as rechunk_module
from dtrain.data.tools.file_description import describe_file
from dtrain.data.tools.file_statistics import store_statistics
from dtrain.data.tools.rechunk import copy_regions, rechunk
from dtrain.errors import ConfigError, DataError
from dtrain.planning.run_data import describe_run_data
from tests.harness import pairwise
from tests.refusals import refuses

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (60, 3, 5, 4)).astype("f4")
Y = np.repeat([1, 2, 4], [30, 20, 10])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as handle:
        handle["x"], handle["y"] = X, Y
    return path


def pair(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as handle:
        return {key: handle.attrs[key] for key in ("mean", "std") if key in handle.attrs}


# describe


def test_a_file_is_described(file: Path, tmp_path: Path) -> None:
    with h5py.File(file, "r+") as handle:
        handle.attrs["classes"] = ["ant", "bee", "cat", "dog", "eel"]
        handle.create_dataset("group/z", data=np.arange(100), chunks=(10,), compression="gzip")
        handle["group/one"] = 3.5
        handle["group/text"] = "abc"
    table = describe_file(file)
    arrays = {array["name"]: array for array in table["arrays"]}
    assert arrays.keys() == {"x", "y", "group/z", "group/one", "group/text"}
    x, z = arrays["x"], arrays["group/z"]
    assert (x["shape"], x["dtype"], x["chunks"]) == ([60, 3, 5, 4], "float32", None)
    assert x["bytes"] == x["stored_bytes"] == X.nbytes
    assert (z["chunks"], z["compression"]) == ([10], "gzip")
    assert 0 < z["stored_bytes"] < z["bytes"] == 800
    assert table["class_names"] == ["ant", "bee", "cat", "dog", "eel"]
    targets = table["targets"]["y"]
    assert targets["counts"] == {"1": 30, "2": 20, "4": 10}
    assert (targets["smallest"], targets["largest"]) == (1, 4)
    assert targets["classes_without_samples"] == [0, 3]
    assert table["statistics"] is None
    json.dumps(table, allow_nan=False)


def test_values_are_counted(file: Path) -> None:
    with h5py.File(file, "r+") as handle:
        handle["x"][17, 1, 2, 3] = np.inf
        handle["x"][40] = np.nan
    arrays = {array["name"]: array for array in describe_file(file, values=True)["arrays"]}
    assert arrays["x"]["not_finite"] == {"nan": 60, "infinite": 1, "first_sample": 17}
    assert arrays["y"]["not_finite"] == {"nan": 0, "infinite": 0, "first_sample": None}
    assert all("not_finite" not in array for array in describe_file(file)["arrays"])


def test_real_targets_and_many_labels(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(file, "r+") as handle:
        handle["real"] = np.linspace(-1.5, 2, 60)
        handle["ids"] = np.arange(60) * 1000
    real = describe_file(file, ImportOptions(y="real"))["targets"]["real"]
    assert (real["smallest"], real["largest"], real["counts"]) == (-1.5, 2, None)
    monkeypatch.setattr("dtrain.data.tools.file_description.MAX_VALUES", 50)
    ids = describe_file(file, ImportOptions(y="ids"))["targets"]["ids"]
    assert (ids["smallest"], ids["largest"], ids["counts"]) == (0, 59000, None)


def test_labels_are_read_in_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_pieces, "PIECE_BYTES", 40)
    assert describe_file(file)["targets"]["y"]["counts"] == {"1": 30, "2": 20, "4": 10}


def test_other_formats_are_described(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y, more=np.zeros(2))
    table = describe_file(tmp_path / "a.npz", values=True)
    assert [array["name"] for array in table["arrays"]] == ["x", "y", "more"]
    assert next(iter(table["targets"].values()))["counts"] == {"1": 30, "2": 20, "4": 10}
    np.savez(tmp_path / "b.npz", images=X)
    assert describe_file(tmp_path / "b.npz")["targets"] == {}
    np.save(tmp_path / "a.npy", X)
    assert describe_file(tmp_path / "a.npy")["arrays"][0]["shape"] == [60, 3, 5, 4]
    (tmp_path / "a.csv").write_text("a,kind\n1,dog\n2,cat\n3,dog\n")
    table = describe_file(tmp_path / "a.csv")
    assert table["class_names"] == ["cat", "dog"]
    assert next(iter(table["targets"].values()))["counts"] == {"0": 1, "1": 2}
    with refuses(DataError, "data.describe-format"):
        describe_file(tmp_path)
    with refuses(DataError, "data.file-missing"):
        describe_file(tmp_path / "none.h5")


RUN = """
epochs = 3
batch-size = 16
[data]
name = "hdf5"
train = "a.h5"
test = "a.h5"
validation = 0.1
shuffle = "chunks"
[model]
name = "mlp"
widths = [8]
[optimizer]
name = "sgd"
lr = 0.1
"""


def test_a_run_is_described(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file.with_name("run.toml")
    path.write_text(RUN)
    table = describe_run_data(read_run(path, []), values=True)
    splits = table["splits"]
    assert {name: split["samples"] for name, split in splits.items()} == {
        "train": 54,
        "test": 60,
        "validation": 6,
    }
    assert splits["test"]["targets"]["counts"] == {"1": 30, "2": 20, "4": 10}
    assert splits["train"]["targets"]["classes_without_samples"] == [0, 3]
    assert splits["test"]["bytes"] == X.nbytes
    assert table["input"] == {"shape": [3, 5, 4], "dtype": "float32", "stored_dtype": "float32"}
    assert (table["target"]["kind"], table["classes"]) == ("classes", 5)
    assert (table["updates_per_epoch"], table["last_batch_size"], table["updates"]) == (4, 6, 12)
    assert (table["shuffle"], table["statistics"]) == ("chunks", "computed")
    assert main(["data", "describe", str(path), "--json", "--values"]) == 0
    assert json.loads(capsys.readouterr().out) == table
    assert main(["data", "describe", str(path), "--set", "data.validation=0.0"]) == 0
    assert "validation" not in capsys.readouterr().out
    store_statistics(file)
    changed = read_run(path, ["data.validation=0.0", "dtype=float64"])
    assert describe_run_data(changed)["statistics"] == "given"
    assert describe_run_data(changed)["input"]["dtype"] == "float64"
    weighted = read_run(path, ["data.sampler=balanced"])
    assert describe_run_data(weighted)["sampler"] == "balanced"
    plain = read_run(path, ["data.normalise=false"])
    assert describe_run_data(plain)["statistics"] is None
    wrong = main(["data", "describe", str(path), "--set", "data.train=none.h5"])
    assert wrong == DataError.code


# stats


@pytest.mark.parametrize(
    ("channels", "axes"),
    [("first", (0, 2, 3)), ("last", (0, 1, 2)), (0, (0, 2, 3)), (1, (0, 1, 3)), (2, (0, 1, 2))],
)
def test_statistics_are_written(file: Path, channels: Any, axes: tuple[int, ...]) -> None:
    mean, deviation = store_statistics(file, channels)
    stored = pair(file)
    np.testing.assert_allclose(stored["mean"], X.mean(axes, np.float64), rtol=1e-9)
    np.testing.assert_allclose(stored["std"], X.std(axes, np.float64), rtol=1e-9)
    assert np.array_equal(stored["mean"], mean)
    assert np.array_equal(stored["std"], deviation)
    assert store_statistics(file, channels)[0].tolist() == mean.tolist()


def test_statistics_in_the_file_are_those_of_training(tmp_path: Path) -> None:
    """uint8 too: the file has the units as stored, and training scales to 0 ... 1."""
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        handle["x"] = RNG.integers(0, 256, (50, 3, 4), dtype=np.uint8)
        handle["y"] = np.zeros(50, int)
    names = {"train": "a.h5", "test": "a.h5"}
    before = load_data("hdf5", names, tmp_path).train.inputs(range(50))
    store_statistics(tmp_path / "a.h5")
    after = load_data("hdf5", names, tmp_path).train.inputs(range(50))
    np.testing.assert_allclose(after, before, atol=1e-6)


def killed(work: Callable[[], object]) -> int:
    """Run `work` in a process that a patched function ends; return its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("has_old_pair", [False, True])
@pytest.mark.parametrize("writes", [0, 1])
def test_a_killed_process_leaves_no_half_pair(
    file: Path, has_old_pair: bool, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before the first or before the second attribute is written."""
    if has_old_pair:
        with h5py.File(file, "r+") as handle:
            handle.attrs["mean"], handle.attrs["std"] = np.full(3, 7.0), np.full(3, 9.0)
    write, calls = h5py.AttributeManager.__setitem__, itertools.count()

    def write_or_end(attributes: h5py.AttributeManager, name: str, value: object) -> None:
        if next(calls) == writes:
            os._exit(17)
        write(attributes, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(h5py.AttributeManager, "__setitem__", write_or_end)
        assert killed(lambda: store_statistics(file)) == 17
    assert "std" not in pair(file)
    with h5py.File(file) as handle:
        assert np.array_equal(handle["x"][()], X)
    store_statistics(file)
    assert pair(file).keys() == {"mean", "std"}


def test_wrong_statistics(file: Path, tmp_path: Path) -> None:
    for channels in ("middle", 3, -1):
        with refuses(ConfigError, "data.channels-axis"):
            store_statistics(file, channels)
    with h5py.File(file, "r+") as handle:
        handle["x"][17, 2] = np.nan
    with refuses(DataError, "data.statistics-not-finite") as caught:
        store_statistics(file)
    assert "sample 17, channel 2" in caught.value.message
    with refuses(DataError, "data.file-missing"):
        store_statistics(tmp_path / "none.h5")
    with refuses(DataError, "data.hdf5-dataset-missing"):
        store_statistics(file, name="z")
    assert main(["data", "stats", str(file), "--x", "z"]) == DataError.code
    assert pair(file) == {}


# rechunk

STORED: dict[str, dict[str, Any]] = {
    "rows": {"chunks": (1, 3, 5, 4)},
    "many rows": {"chunks": (50, 3, 5, 4), "compression": "gzip"},
    "all rows": {"chunks": (60, 3, 5, 4), "compression": "lzf", "shuffle": True},
    "parts of samples": {"chunks": (60, 1, 2, 3), "compression": "gzip"},
    "contiguous": {},
}


@pytest.mark.parametrize(
    ("stored", "compression", "region_bytes"),
    pairwise([*itertools.product(STORED, ("none", "gzip", "lzf"), (2**25, 2000, 1))]),
)
def test_a_copy_holds_the_same(
    tmp_path: Path,
    stored: str,
    compression: Any,
    region_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rechunk_module, "REGION_BYTES", region_bytes)
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        handle.create_dataset("x", data=X, **STORED[stored])
        handle["group/y"] = Y
        handle.attrs["classes"] = ["a", "b"]
        handle["x"].attrs["unit"] = np.float32(2.5)
        handle["group"].attrs["note"] = "text"
    out = tmp_path / "b.h5"
    assert rechunk(tmp_path / "a.h5", out, 1000, compression) == out
    with h5py.File(out) as copy:
        assert copy["x"].chunks == (4, 3, 5, 4)  # 240 bytes a sample
        assert copy["x"].compression == (None if compression == "none" else compression)
        assert copy["x"].dtype == X.dtype
        assert np.array_equal(copy["x"][()], X)
        assert np.array_equal(copy["group/y"][()], Y)
        assert list(copy.attrs["classes"]) == ["a", "b"]
        assert copy["x"].attrs["unit"].dtype == np.float32
        assert copy["group"].attrs["note"] == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_links_and_other_objects_are_copied(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with h5py.File(tmp_path / "part.h5", "w") as handle:
        handle["x"] = X
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        handle["y"] = Y
        handle["same"] = handle["y"]
        handle["soft"] = h5py.SoftLink("/y")
        handle["external"] = h5py.ExternalLink("part.h5", "x")
        handle["names"] = ["ant", "beetle"]
        handle["one"] = 2.5
        handle.create_dataset("empty", (0, 3), "f4")
        handle["scale"] = np.arange(60)
        handle["scale"].make_scale("n")
        handle["y"].dims[0].attach_scale(handle["scale"])
        layout = h5py.VirtualLayout(X.shape, X.dtype)
        layout[:] = h5py.VirtualSource("part.h5", "x", X.shape)
        handle.create_virtual_dataset("virtual", layout)
    rechunk(tmp_path / "a.h5", tmp_path / "sub" / "b.h5")
    with h5py.File(tmp_path / "sub" / "b.h5") as copy:
        for name in ("y", "same", "soft"):
            assert np.array_equal(copy[name][()], Y)
        assert copy["same"] == copy["y"]
        assert isinstance(copy.get("soft", getlink=True), h5py.SoftLink)
        assert np.array_equal(copy["external"][()], X)
        assert [name.decode() for name in copy["names"]] == ["ant", "beetle"]
        assert (copy["one"][()], copy["empty"].shape) == (2.5, (0, 3))
        assert np.array_equal(copy["virtual"][()], X)
        assert copy["virtual"].chunks
    (tmp_path / "part.h5").unlink()
    with refuses(DataError, "data.hdf5-part-missing"):
        rechunk(tmp_path / "a.h5", tmp_path / "c.h5")
    assert not list(tmp_path.glob(".*")) + list(tmp_path.glob("c.h5"))


@pytest.mark.parametrize(
    ("shape", "chunk", "region_bytes"),
    pairwise(
        [*itertools.product(((13,), (13, 7), (10, 3, 5)), (1, 2, 5, 13), (1, 8, 64, 400, 10**6))]
    ),
)
def test_each_chunk_is_read_in_one_run_of_bounded_regions(
    tmp_path: Path,
    shape: tuple[int, ...],
    chunk: int,
    region_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regions cover every number once; a region is a whole number of chunks, or within one."""
    monkeypatch.setattr(rechunk_module, "REGION_BYTES", region_bytes)
    chunks = tuple(min(chunk, length) for length in shape)
    with h5py.File(tmp_path / "a.h5", "w") as handle:
        rows = handle.create_dataset("x", shape, "i8", chunks=chunks)
        seen, visited = np.zeros(shape, int), []
        for region in copy_regions(rows):
            seen[region] += 1
            size = seen[region].nbytes
            assert size <= max(region_bytes, 8 * int(np.prod(chunks[1:])))
            grid = itertools.product(*(range(0, n, c) for n, c in zip(shape, chunks, strict=True)))
            part = np.zeros(shape, bool)
            part[region] = True
            touched = [
                corner
                for corner in grid
                if part[tuple(slice(a, a + c) for a, c in zip(corner, chunks, strict=True))].any()
            ]
            visited += [corner for corner in touched if visited[-1:] != [corner]]
    assert (seen == 1).all()
    assert len(visited) == len(set(visited))


def test_a_failed_copy_leaves_nothing(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.h5"
    with refuses(ConfigError, "import.output-exists"):
        rechunk(file, file)
    with refuses(ConfigError, "data.chunk-bytes"):
        rechunk(file, out, 0)
    with refuses(DataError, "data.file-missing"):
        rechunk(tmp_path / "none.h5", out)
    with h5py.File(file, "w") as handle:
        noise = RNG.integers(0, 256, (60, 1000), dtype=np.uint8)
        handle.create_dataset("x", data=noise, chunks=(10, 1000), compression="gzip")
        place = handle["x"].id.get_chunk_info(3).byte_offset
    content = bytearray(file.read_bytes())
    content[place : place + 200] = bytes(200)
    file.write_bytes(content)
    with refuses(DataError, "data.file-damaged"):
        rechunk(file, out)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("verb", ["rechunk", "import"])
def test_a_full_disk_is_named_and_leaves_nothing(file: Path, tmp_path: Path, verb: str) -> None:
    """A limit on the size of files stands for the disk."""
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    source = {"rechunk": file, "import": tmp_path / "a.npz"}[verb]
    before = sorted(tmp_path.iterdir())

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        os._exit(main(["data", verb, str(source), str(tmp_path / "b.h5")]))

    assert killed(work) == ConfigError.code
    assert sorted(tmp_path.iterdir()) == before


def test_large_samples_have_a_chunk_each() -> None:
    """HDF5 has no chunks of 4 GiB."""
    assert hdf5_writer.chunk_shape((10, 2**20), np.dtype("f4")) == (1, 2**20)
    chunks = hdf5_writer.chunk_shape((10, 3, 2**16, 2**15), np.dtype("f4"))
    assert chunks[0] == 1
    assert 4 * np.prod(chunks) < 2**31
    assert hdf5_writer.chunk_shape((10, 5), np.dtype("u1")) == (10, 5)


# The command line


def test_the_verbs_of_data(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "rechunk", file, tmp_path / "b.h5", "--chunk-bytes", "500"]
    assert main([*map(str, words), "--compression", "gzip"]) == 0
    assert main(["data", "stats", str(tmp_path / "b.h5"), "--channels", "last"]) == 0
    assert pair(tmp_path / "b.h5")["mean"].shape == (4,)
    capsys.readouterr()
    assert main(["data", "describe", str(tmp_path / "b.h5"), "--json", "--values"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["arrays"][0]["chunks"] == [2, 3, 5, 4]
    assert len(table["statistics"]["mean"]) == 4
    assert main(["data", "describe", str(tmp_path / "b.h5")]) == 0
    assert main(["data", "describe", str(tmp_path / "none.h5")]) == DataError.code
    np.savez(tmp_path / "a.npz", images=X, labels=Y)
    words = ["data", "import", tmp_path / "a.npz", tmp_path / "c.h5", "--x", "images"]
    assert main([*map(str, words), "--y", "labels"]) == 0
    with pytest.raises(SystemExit) as caught:
        main(["data", "import", "a", "b", "--size", "0x3"])
    assert caught.value.code == 2
