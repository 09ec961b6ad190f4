"""Import: the same data give the same files, however they are packed; nothing is unpickled."""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dtrain.data import load_data
from dtrain.data.importing.import_data import ImportOptions, import_data
from dtrain.errors import ConfigError, DataError, DtrainError
from tests.harness import pairwise
from tests.refusals import refuses

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

RNG = np.random.default_rng(0)
PIXELS = {
    name: RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for name in ("cat/b.png", "cat/a.png", "ant/z.png", "dog/1.png", "dog/2.png")
}
ROWS = ["ant/z.png", "cat/a.png", "cat/b.png", "dog/1.png", "dog/2.png"]
LABELS = [0, 1, 1, 2, 2]


def draw(root: Path, pixels: dict[str, np.ndarray] = PIXELS) -> Path:
    for name, value in pixels.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(value).save(path)
    return root


def pack(root: Path, tar: Path, top: str = ".", reverse: bool = False) -> Path:
    """Write a tar whose members are sorted or in reverse order."""
    with tarfile.open(tar, f"w:{tar.suffix[1:]}" if tar.suffix != ".tar" else "w") as archive:
        for path in sorted(root.rglob("*"), reverse=reverse):
            name = f"{top}/{path.relative_to(root)}"
            archive.add(path, name, recursive=False)
    return tar


def stored(path: Path) -> tuple[np.ndarray, list[int], list[str]]:
    with h5py.File(path) as file:
        assert file["x"].dtype == np.uint8
        assert file["y"].dtype == np.int64
        return file["x"][()], file["y"][()].tolist(), list(file.attrs["classes"])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw(tmp_path / "images")


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Return a folder with `train` of three classes and `test` without the first of them."""
    draw(tmp_path / "split/train")
    dogs = {name: PIXELS[name] // 2 for name in ("cat/a.png", "dog/1.png")}
    return draw(tmp_path / "split/test", dogs).parent


def test_a_folder(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    assert import_data(images, out) == [out]
    x, y, classes = stored(out)
    assert np.array_equal(x, np.stack([PIXELS[name].transpose(2, 0, 1) for name in ROWS]))
    assert (y, classes) == (LABELS, ["ant", "cat", "dog"])
    with h5py.File(out) as file:
        np.testing.assert_allclose(file.attrs["mean"], x.mean((0, 2, 3)))
        np.testing.assert_allclose(file.attrs["std"], x.std((0, 2, 3)))


@pytest.mark.parametrize(
    ("name", "top", "reverse"),
    pairwise(
        [
            *itertools.product(
                ("a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"),
                (".", "images", "deep/er"),
                (False, True),
            )
        ]
    ),
)
def test_a_tar_gives_the_same(
    images: Path, tmp_path: Path, name: str, top: str, reverse: bool
) -> None:
    out = tmp_path / "out.h5"
    import_data(pack(images, tmp_path / name, top, reverse), out)
    x, y, _ = stored(out)
    assert np.array_equal(x, np.stack([PIXELS[name].transpose(2, 0, 1) for name in ROWS]))
    assert y == LABELS


@pytest.mark.parametrize("packed", [False, True])
def test_train_and_test(split: Path, tmp_path: Path, packed: bool) -> None:
    source = pack(split, tmp_path / "a.tar.gz", "outer") if packed else split
    out, other = tmp_path / "out.h5", tmp_path / "out-test.h5"
    assert import_data(source, out) == [out, other]
    assert stored(out)[1] == LABELS
    assert stored(other)[1:] == ([1, 2], ["ant", "cat", "dog"])
    with h5py.File(out) as train, h5py.File(other) as test:
        for key in ("mean", "std"):
            assert np.array_equal(train.attrs[key], test.attrs[key])
    splits = load_data("hdf5", {"train": "out.h5", "test": "out-test.h5"}, tmp_path)
    x = splits.train.inputs(range(5)).double()
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(x.std((0, 2, 3), correction=0), 1, atol=1e-6)


def test_one_named_split(split: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    assert import_data(split, out, ImportOptions(split="test")) == [out]
    assert stored(out)[1:] == ([0, 1], ["cat", "dog"])
    assert not (tmp_path / "out-test.h5").exists()
    with refuses(DataError, "import.split-missing"):
        import_data(split, tmp_path / "o.h5", ImportOptions(split="val"))


def test_grey_stays_grey_and_mixed_becomes_rgb(tmp_path: Path) -> None:
    grey = {name: value[:, :, 0] for name, value in PIXELS.items()}
    import_data(draw(tmp_path / "grey", grey), tmp_path / "grey.h5")
    x, *_ = stored(tmp_path / "grey.h5")
    assert np.array_equal(x, np.stack([grey[name][None] for name in ROWS]))
    draw(tmp_path / "mixed", grey | {"cat/a.png": PIXELS["cat/a.png"]})
    import_data(tmp_path / "mixed", tmp_path / "mixed.h5")
    x, *_ = stored(tmp_path / "mixed.h5")
    assert np.array_equal(x[0], np.stack([grey["ant/z.png"]] * 3))
    assert np.array_equal(x[1], PIXELS["cat/a.png"].transpose(2, 0, 1))


def test_many_rows_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two full writes and a partial one."""
    monkeypatch.setattr("dtrain.data.formats.hdf5_pieces.PIECE_BYTES", 64 * 4)
    values = RNG.integers(0, 256, (140, 2, 2), dtype=np.uint8)
    names = [f"{'ab'[i % 2]}/{i:04}.png" for i in range(140)]
    draw(tmp_path / "many", dict(zip(names, values, strict=True)))
    for reverse in (False, True):
        out = tmp_path / f"{reverse}.h5"
        import_data(pack(tmp_path / "many", tmp_path / "m.tar", reverse=reverse), out)
        assert np.array_equal(stored(out)[0][:, 0], np.concatenate([values[::2], values[1::2]]))


def test_other_files_are_ignored(images: Path, tmp_path: Path) -> None:
    others = ("README.md", "cat/Thumbs.db", "cat/._a.png", ".hidden/a.png", "__MACOSX/cat/a.png")
    for name in others:
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    import_data(images, tmp_path / "out.h5")
    assert stored(tmp_path / "out.h5")[1] == LABELS


def test_a_tar_never_leaves_its_file(images: Path, tmp_path: Path) -> None:
    """Links, devices and `..` are ignored, and nothing is extracted."""
    secret = draw(tmp_path / "secret", {"x/a.png": PIXELS["cat/a.png"]}) / "x/a.png"
    tar = tmp_path / "evil.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(images, ".")
        for name, kind in (
            ("cat/sym.png", tarfile.SYMTYPE),
            ("cat/hard.png", tarfile.LNKTYPE),
            ("cat/dev.png", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
        member = tarfile.TarInfo("../cat/up.png")
        member.size = secret.stat().st_size
        archive.addfile(member, io.BytesIO(secret.read_bytes()))
    before = sorted(tmp_path.rglob("*"))
    import_data(tar, tmp_path / "out.h5")
    assert stored(tmp_path / "out.h5")[1] == LABELS
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "out.h5"])


# Refusals


def test_nothing_is_overwritten(split: Path, tmp_path: Path) -> None:
    (tmp_path / "out-test.h5").write_text("mine")
    with refuses(ConfigError, "import.output-exists"):
        import_data(split, tmp_path / "out.h5")
    assert (tmp_path / "out-test.h5").read_text() == "mine"
    assert not (tmp_path / "out.h5").exists()
    with refuses(ConfigError, "import.folder-missing"):
        import_data(split, tmp_path / "no/out.h5")


def test_wrong_sources(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    with refuses(DataError, "import.source-missing"):
        import_data(tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    with refuses(DataError, "import.no-images"):
        import_data(tmp_path / "empty", out)
    (tmp_path / "text").write_text("hello")
    with refuses(DataError, "import.tar-damaged"):
        import_data(tmp_path / "text", out)
    Image.new("RGB", (5, 5)).save(images / "cat/c.png")
    with refuses(DataError, "import.sizes-differ") as caught:
        import_data(images, out)
    assert "cat/c.png" in caught.value.message
    (images / "cat/c.png").unlink()
    (images / "cat/deep").mkdir()
    (images / "cat/a.png").rename(images / "cat/deep/a.png")
    with refuses(DataError, "import.image-misplaced") as caught:
        import_data(images, out)
    assert "cat/deep/a.png" in caught.value.message
    assert not list(tmp_path.glob("*.h5")) + list(tmp_path.glob(".*"))


def test_splits_of_other_names(split: Path, tmp_path: Path) -> None:
    (split / "test").rename(split / "val")
    with refuses(DataError, "import.split-ambiguous"):
        import_data(split, tmp_path / "o.h5")


def test_a_class_that_only_test_has(split: Path, tmp_path: Path) -> None:
    draw(split / "test", {"yak/1.png": PIXELS["cat/a.png"]})
    with refuses(DataError, "import.class-unknown"):
        import_data(split, tmp_path / "o.h5")


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.9])
def test_damaged_images_leave_nothing(images: Path, tmp_path: Path, fraction: float) -> None:
    noise = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in ROWS:
        Image.fromarray(noise).save(images / name)
    content = (images / "dog/2.png").read_bytes()
    (images / "dog/2.png").write_bytes(content[: int(len(content) * fraction)])
    with refuses(DataError, "import.image-damaged") as caught:
        import_data(images, tmp_path / "out.h5")
    assert "dog/2.png" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_truncated_tars(images: Path, tmp_path: Path, fraction: float) -> None:
    tar = pack(images, tmp_path / "a.tar.gz")
    content = tar.read_bytes()
    tar.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(DataError) as caught:  # of an image or of the tar, by where it is cut
        import_data(tar, tmp_path / "out.h5")
    assert caught.value.key in ("import.image-damaged", "import.tar-damaged")
    assert not (tmp_path / "out.h5").exists()


def test_a_name_that_occurs_twice(images: Path, tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(images, ".")
        archive.add(images / "cat/a.png", "cat/a.png")
    with refuses(DataError, "import.image-twice") as caught:
        import_data(tar, tmp_path / "out.h5")
    assert "cat/a.png" in caught.value.message


def test_without_pillow(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with refuses(DataError, "import.pillow-missing"):
        import_data(images, tmp_path / "o.h5")


# Depth and size of images


@pytest.mark.parametrize(
    ("dtype", "suffix", "stored_dtype"),
    [("u2", "png", "u2"), ("u2", "tif", "u2"), ("i4", "tif", "i4"), ("f4", "tif", "f4")],
)
@pytest.mark.parametrize("options", [ImportOptions(), ImportOptions(size=(4, 6), fit="resize")])
def test_deep_pixels_are_kept(
    tmp_path: Path, dtype: str, suffix: str, stored_dtype: str, options: ImportOptions
) -> None:
    """A volume's slices of 16 or 32 bits keep every bit, and train."""
    values = (RNG.random((5, 4, 6)) * 60_000 + 300).astype(dtype)
    for number, value in enumerate(values):
        path = tmp_path / "deep" / "ab"[number % 2] / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(value).save(path)
    import_data(tmp_path / "deep", tmp_path / "o.h5", options)
    with h5py.File(tmp_path / "o.h5") as file:
        assert file["x"].dtype == np.dtype(stored_dtype)
        assert np.array_equal(file["x"][:, 0], values[[0, 2, 4, 1, 3]])
        assert file.attrs["mean"] == pytest.approx(values.mean(dtype=np.float64))
    splits = load_data("hdf5", {"train": "o.h5", "test": "o.h5"}, tmp_path, normalise=False)
    assert np.array_equal(splits.train.inputs([0])[0, 0].numpy(), values[0].astype(np.float32))


def test_deep_and_shallow_pixels_are_not_mixed(images: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(images / "cat/a.png")
    with refuses(DataError, "import.image-depth") as caught:
        import_data(images, tmp_path / "out.h5")
    assert "cat/a.png" in caught.value.message


def test_colours_of_16_bits_are_not_halved(images: Path, tmp_path: Path) -> None:
    """Pillow reads the high bytes of such a PNG without a word."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(36) for _ in range(4)))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (images / "cat/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with refuses(DataError, "import.colour-depth") as caught:
        import_data(images, tmp_path / "out.h5")
    assert "cat/a.png" in caught.value.message


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_of_several_sizes(tmp_path: Path, dtype: type) -> None:
    """The shorter side becomes the size; the centre is kept. A crop changes no pixel."""
    ramp = np.arange(12, dtype=dtype)
    wide = np.repeat(np.tile(ramp, (4, 1)), 1, axis=0)  # 4 x 12, columns 0 to 11
    tall = np.tile(np.repeat(np.arange(6, dtype=dtype), 2)[:, None] * 20, (1, 8))  # 12 x 8
    draw(tmp_path / "sizes", {"a/wide.png": wide, "a/tall.png": tall})
    import_data(tmp_path / "sizes", tmp_path / "r.h5", ImportOptions(size=(4, 4)))
    import_data(tmp_path / "sizes", tmp_path / "c.h5", ImportOptions(size=(4, 4), fit="crop"))
    with h5py.File(tmp_path / "r.h5") as file:
        assert file["x"].dtype == dtype
        resized_tall, resized_wide = file["x"][:, 0]
    assert np.array_equal(resized_wide, wide[:, 4:8])
    assert np.array_equal(resized_tall, np.tile([[20], [40], [60], [80]], (1, 4)))
    with h5py.File(tmp_path / "c.h5") as file:
        assert np.array_equal(file["x"][:, 0], [tall[4:8, 2:6], wide[:, 4:8]])
    with refuses(DataError, "import.image-too-small") as caught:
        import_data(tmp_path / "sizes", tmp_path / "o.h5", ImportOptions(size=(5, 4), fit="crop"))
    assert "a/wide.png" in caught.value.message
    with refuses(ConfigError, "import.fit-without-size"):
        import_data(tmp_path / "sizes", tmp_path / "o.h5", ImportOptions(fit="crop"))


def test_many_classes(tmp_path: Path) -> None:
    """Names of more than 64 KB, as those of ImageNet-21k."""
    names = np.array([f"class {number:05}" for number in range(5000)])
    np.savez(tmp_path / "a.npz", x=np.zeros((5000, 2)), y=names)
    import_data(tmp_path / "a.npz", tmp_path / "o.h5")
    with h5py.File(tmp_path / "o.h5") as file:
        assert list(file.attrs["classes"]) == list(names)


# Arrays

X = {
    kind: (RNG.random((23, 3, 2)) * 200).astype(kind)
    for kind in ("u1", ">i2", "u4", "i8", "f2", "f4", ">f8", "?")
}
Y = np.arange(23) % 4


def arrays_in(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with h5py.File(path) as file:
        return file["x"][()], file["y"][()]


def save_idx(path: Path, array: np.ndarray) -> None:
    codes = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
    code = codes[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    content = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(content)


PIECES = (2**22, 30)
"""Bytes of one piece, and of pieces of a few samples."""


@pytest.fixture(params=PIECES)
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece, and pieces of a few samples."""
    monkeypatch.setattr("dtrain.data.formats.hdf5_pieces.PIECE_BYTES", request.param)


SAVES = (np.savez, np.savez_compressed, "npy")


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize(
    ("kind", "order", "save", "piece_bytes"),
    pairwise([*itertools.product(X, "CF", SAVES, PIECES)]),
    indirect=["piece_bytes"],
)
def test_arrays_keep_shape_dtype_and_values(
    tmp_path: Path, kind: str, order: str, save: Any
) -> None:
    x = np.asarray(X[kind], order=order)
    options = ImportOptions()
    if save == "npy":
        np.save(tmp_path / "a", x)
        np.save(tmp_path / "y", Y)
        options = ImportOptions(y=str(tmp_path / "y.npy"))
    else:
        save(tmp_path / "a", x=x, y=Y)
    (source,) = tmp_path.glob("a.*")
    import_data(source, tmp_path / "o.h5", options)
    stored_x, stored_y = arrays_in(tmp_path / "o.h5")
    assert (stored_x.dtype, stored_y.dtype) == (x.dtype.newbyteorder("="), Y.dtype)
    assert np.array_equal(stored_x, x)
    assert np.array_equal(stored_y, Y)
    with h5py.File(tmp_path / "o.h5") as file:
        np.testing.assert_allclose(file.attrs["mean"], x.mean((0, 2), np.float64))


def test_splits_of_an_npz(tmp_path: Path) -> None:
    names = np.array(["dog", "cat", "ant", "cat"])
    x = np.eye(4)
    parts = {"x_train": x, "y_train": names, "x_test": x[:2], "y_test": names[1:3]}
    np.savez(tmp_path / "a.npz", **parts, x_val=x[:1], y_val=names[:1], other=Y)
    written = import_data(tmp_path / "a.npz", tmp_path / "o.h5")
    assert [path.name for path in written] == ["o.h5", "o-test.h5", "o-validation.h5"]
    assert [arrays_in(path)[1].tolist() for path in written] == [[2, 1, 0, 1], [1, 0], [2]]
    for path in written:
        with h5py.File(path) as file:
            assert list(file.attrs["classes"]) == ["ant", "cat", "dog"]
            np.testing.assert_allclose(file.attrs["mean"], x.mean(0))
    import_data(tmp_path / "a.npz", tmp_path / "one.h5", ImportOptions(split="test"))
    assert arrays_in(tmp_path / "one.h5")[1].tolist() == [1, 0]
    chosen = ImportOptions(x="x_test", y="y_test")
    import_data(tmp_path / "a.npz", tmp_path / "two.h5", chosen)
    assert np.array_equal(arrays_in(tmp_path / "two.h5")[0], x[:2])
    np.savez(tmp_path / "b.npz", **parts | {"y_test": np.array(["cat", "yak"])})
    with refuses(DataError, "import.class-unknown"):
        import_data(tmp_path / "b.npz", tmp_path / "b.h5")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_the_four_files_of_mnist(tmp_path: Path, suffix: str, dot: str) -> None:
    pixels = RNG.integers(0, 256, (7, 5, 4), dtype=np.uint8)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for split, rows in (("train", slice(0, 4)), ("t10k", slice(4, 7))):
        save_idx(folder / f"{split}-images{dot}idx3-ubyte{suffix}", pixels[rows])
        save_idx(folder / f"{split}-labels{dot}idx1-ubyte{suffix}", Y[rows].astype(np.uint8))
    written = import_data(folder, tmp_path / "o.h5")
    assert [path.name for path in written] == ["o.h5", "o-test.h5"]
    for path, rows in zip(written, (slice(0, 4), slice(4, 7)), strict=True):
        x, y = arrays_in(path)
        assert x.dtype == np.uint8
        assert np.array_equal(x, pixels[rows, None])
        assert np.array_equal(y, Y[rows])
    one = import_data(folder / f"train-images{dot}idx3-ubyte{suffix}", tmp_path / "one.h5")
    assert np.array_equal(arrays_in(one[0])[1], Y[:4])
    (folder / f"t10k-labels{dot}idx1-ubyte{suffix}").unlink()
    with refuses(DataError, "data.idx-files"):
        import_data(folder, tmp_path / "p.h5")


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "i4", "f4", "f8"])
def test_idx_of_every_dtype(tmp_path: Path, kind: str) -> None:
    x = (RNG.random((9, 6)) * 100 - (kind != "u1") * 50).astype(kind)
    save_idx(tmp_path / "a.idx", x)
    save_idx(tmp_path / "y.gz", Y[:9].astype("i4"))
    import_data(tmp_path / "a.idx", tmp_path / "o.h5", ImportOptions(y=str(tmp_path / "y.gz")))
    stored_x, stored_y = arrays_in(tmp_path / "o.h5")
    assert (stored_x.dtype, stored_y.dtype) == (np.dtype(kind), np.dtype("i4"))
    assert np.array_equal(stored_x, x)
    assert np.array_equal(stored_y, Y[:9])


TABLES: dict[str, tuple[str, str | None, Any, Any, list[str] | None]] = {
    "header": ("a,b,y\n1,2.5,0\n3,4,2\n", None, [[1, 2.5], [3, 4]], [0, 2], None),
    "no header": ("1,2,0\n3,4,1\n", None, [[1, 2], [3, 4]], [0, 1], None),
    "names": ("1;2.5;dog\n3;4;cat\n", None, [[1, 2.5], [3, 4]], [1, 0], ["cat", "dog"]),
    "real": ("a\ty\n1\t2.0\n\n3\t2.5\n", None, [[1], [3]], [[2.0], [2.5]], None),
    "whole numbers with a point": ("1,2.0\n3,1.0\n", None, [[1], [3]], [2, 1], None),
    "by name": ("y,a\nyes,-1\nno,1e3\n", "y", [[-1], [1000]], [1, 0], ["no", "yes"]),
    "by number": ("0,5,1\n1,6,2\n", "1", [[0, 1], [1, 2]], [5, 6], None),
    "from the end": ("0,5,1\n1,6,2\n", "-3", [[5, 1], [6, 2]], [0, 1], None),
    "quotes": ('"a, b",y\r\n" 1","x, ""z"""\r\n2,w\r\n', None, [[1], [2]], [1, 0], ["w", 'x, "z"']),
    "byte order mark": ("\ufeff1,2\n3,4\n", None, [[1], [3]], [2, 4], None),
    "large": ("1,0\n16777217,1\n", None, [[1.0], [2.0**24 + 1]], [0, 1], None),
    "numbers as names": ("0,1,label\n5,6,0\n7,8,1\n", None, [[5, 6], [7, 8]], [0, 1], None),
}


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize(
    ("name", "packed", "piece_bytes"),
    pairwise([*itertools.product(TABLES, (False, True), PIECES)]),
    indirect=["piece_bytes"],
)
def test_tables(tmp_path: Path, name: str, packed: bool) -> None:
    text, target, x, y, classes = TABLES[name]
    source = tmp_path / ("t.csv.gz" if packed else "t.csv")
    content = text.encode()
    source.write_bytes(gzip.compress(content) if packed else content)
    import_data(source, tmp_path / "o.h5", ImportOptions(target=target))
    stored_x, stored_y = arrays_in(tmp_path / "o.h5")
    for stored_array, value in ((stored_x, np.array(x)), (stored_y, np.array(y))):
        assert stored_array.dtype == value.dtype
        assert np.array_equal(stored_array, value)
    with h5py.File(tmp_path / "o.h5") as file:
        assert (list(file.attrs["classes"]) if "classes" in file.attrs else None) == classes


WRONG_TABLES: dict[str, tuple[type[DtrainError], str]] = {
    "data.csv-columns": (DataError, "1,2\n3,4,5\n"),
    "data.csv-field": (DataError, "1,2\n3,4\nred,5\n"),
    "import.csv-one-column": (DataError, "1\n2\n"),
    "import.csv-unnamed-column": (DataError, ",a,y\n0,1,2\n"),
    "data.no-column": (ConfigError, "a,b\n1,2\n"),
    "data.csv-empty": (DataError, ""),
    "data.samples-empty": (DataError, "a,b\n"),
    "data.file-damaged": (DataError, "1,2\n\xff\n"),
}


@pytest.mark.parametrize("key", WRONG_TABLES)
def test_wrong_tables(tmp_path: Path, key: str) -> None:
    source = tmp_path / "t.csv"
    kind, text = WRONG_TABLES[key]
    source.write_bytes(text.encode("latin-1"))
    with refuses(kind, key) as caught:
        target = "z" if key == "data.no-column" else None
        import_data(source, tmp_path / "o.h5", ImportOptions(target=target))
    assert "t.csv" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("member", ["x", "y"])
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_objects_are_never_unpickled(tmp_path: Path, member: str, form: str) -> None:
    """Reading this array as numpy does by default would create the file `proof`."""

    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "proof",)  # type: ignore[return-value]

    arrays = {"x": np.zeros((2, 2)), "y": np.zeros(2, int)}
    arrays[member] = np.array([[Attack()] * 2] * 2 if member == "x" else [Attack()] * 2)
    options = ImportOptions()
    if form == "npz":
        np.savez(tmp_path / "a.npz", allow_pickle=True, **arrays)
    else:
        np.save(tmp_path / "a.npy", arrays["x"])
        np.save(tmp_path / "y.npy", arrays["y"])
        options = ImportOptions(y=str(tmp_path / "y.npy"))
    with refuses(DataError, "data.objects") as caught:
        import_data(tmp_path / f"a.{form}", tmp_path / "o.h5", options)
    assert f"{member if form == 'npz' else {'x': 'a', 'y': 'y'}[member]}" in caught.value.message
    assert not (tmp_path / "proof").exists()


def test_wrong_arrays(tmp_path: Path) -> None:
    out = tmp_path / "o.h5"
    source = tmp_path / "a.npz"
    np.savez(source, images=X["u1"], labels=Y)
    with refuses(DataError, "import.array-missing"):
        import_data(source, out)
    import_data(source, tmp_path / "named.h5", ImportOptions(x="images", y="labels"))
    with refuses(DataError, "import.split-missing"):
        chosen = ImportOptions(x="images", y="labels", split="test")
        import_data(source, out, chosen)
    np.savez(source, x=X["u1"], y=Y[:-1])
    with refuses(DataError, "data.lengths-differ"):
        import_data(source, out)
    for option in ({"target": "1"}, {"size": (2, 2)}):
        with refuses(ConfigError, "import.option-unused"):
            import_data(source, out, ImportOptions(**option))
    np.save(tmp_path / "a.npy", X["u1"])
    with refuses(DataError, "import.targets-missing"):
        import_data(tmp_path / "a.npy", out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "train-images-idx3-ubyte", "a.gz"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_truncated_arrays_leave_nothing(tmp_path: Path, name: str, fraction: float) -> None:
    source = tmp_path / name
    pixels = RNG.integers(0, 256, (40, 9, 9), dtype=np.uint8)
    np.save(tmp_path / "y.npy", np.zeros(40, int))
    options = ImportOptions(y=str(tmp_path / "y.npy"))
    if name == "a.npz":
        np.savez_compressed(source, x=pixels, y=np.zeros(40, int))
        options = ImportOptions()
    elif name == "a.npy":
        np.save(source, pixels)
    else:
        save_idx(source, pixels)
        save_idx(tmp_path / "labels", np.zeros(40, np.uint8))
        options = ImportOptions(y=str(tmp_path / "labels"))
    content = source.read_bytes()
    source.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(DataError) as caught:
        import_data(source, tmp_path / "o.h5", options)
    assert caught.value.key in ("data.file-damaged", "import.tar-damaged")
    assert not list(tmp_path.glob("*.h5")) + list(tmp_path.glob(".*"))


def test_values_that_are_not_finite_leave_the_statistics_out(tmp_path: Path) -> None:
    """Training names the sample; a file with such statistics would hide it."""
    x = np.ones((3, 2))
    x[1, 0] = np.nan
    np.savez(tmp_path / "a.npz", x=x, y=Y[:3])
    import_data(tmp_path / "a.npz", tmp_path / "o.h5")
    with h5py.File(tmp_path / "o.h5") as file:
        assert "mean" not in file.attrs


def test_memory_does_not_grow_with_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 MB of samples in pieces of 256 KB; the allocations of numpy and Python are counted."""
    monkeypatch.setattr("dtrain.data.formats.hdf5_pieces.PIECE_BYTES", 2**18)
    monkeypatch.setattr("dtrain.data.statistics.statistics_pass.EXACT_PIECE_BYTES", 2**18)
    np.save(tmp_path / "x.npy", np.zeros((1000, 1, 128, 128), np.uint8))
    np.save(tmp_path / "y.npy", np.zeros(1000, int))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("x.npy", "y.npy"):
            archive.write(tmp_path / name, name)
    cases = {"x.npy": ImportOptions(y=str(tmp_path / "y.npy")), "a.npz": ImportOptions()}
    for name, options in cases.items():
        tracemalloc.start()
        import_data(tmp_path / name, tmp_path / f"{name}.h5", options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12e6
