"""Import: the same images give the same files, however they are packed."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from dtrain.data import load_data
from dtrain.data.import_images import import_images
from dtrain.errors import ConfigError, DataError
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
    assert import_images(images, out, None) == [out]
    x, y, classes = stored(out)
    assert np.array_equal(x, np.stack([PIXELS[name].transpose(2, 0, 1) for name in ROWS]))
    assert (y, classes) == (LABELS, ["ant", "cat", "dog"])
    with h5py.File(out) as file:
        np.testing.assert_allclose(file.attrs["mean"], x.mean((0, 2, 3)))
        np.testing.assert_allclose(file.attrs["std"], x.std((0, 2, 3)))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
@pytest.mark.parametrize("top", [".", "images", "deep/er"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_tar_gives_the_same(
    images: Path, tmp_path: Path, name: str, top: str, reverse: bool
) -> None:
    out = tmp_path / "out.h5"
    import_images(pack(images, tmp_path / name, top, reverse), out, None)
    x, y, _ = stored(out)
    assert np.array_equal(x, np.stack([PIXELS[name].transpose(2, 0, 1) for name in ROWS]))
    assert y == LABELS


@pytest.mark.parametrize("packed", [False, True])
def test_train_and_test(split: Path, tmp_path: Path, packed: bool) -> None:
    source = pack(split, tmp_path / "a.tar.gz", "outer") if packed else split
    out, other = tmp_path / "out.h5", tmp_path / "out-test.h5"
    assert import_images(source, out, None) == [out, other]
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
    assert import_images(split, out, "test") == [out]
    assert stored(out)[1:] == ([0, 1], ["cat", "dog"])
    assert not (tmp_path / "out-test.h5").exists()
    with refuses(DataError, "import.split-missing"):
        import_images(split, tmp_path / "o.h5", "val")


def test_grey_stays_grey_and_mixed_becomes_rgb(tmp_path: Path) -> None:
    grey = {name: value[:, :, 0] for name, value in PIXELS.items()}
    import_images(draw(tmp_path / "grey", grey), tmp_path / "grey.h5", None)
    x, *_ = stored(tmp_path / "grey.h5")
    assert np.array_equal(x, np.stack([grey[name][None] for name in ROWS]))
    draw(tmp_path / "mixed", grey | {"cat/a.png": PIXELS["cat/a.png"]})
    import_images(tmp_path / "mixed", tmp_path / "mixed.h5", None)
    x, *_ = stored(tmp_path / "mixed.h5")
    assert np.array_equal(x[0], np.stack([grey["ant/z.png"]] * 3))
    assert np.array_equal(x[1], PIXELS["cat/a.png"].transpose(2, 0, 1))


def test_many_rows_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two full writes and a partial one."""
    monkeypatch.setattr("dtrain.data.import_images.ROWS_PER_WRITE", 64)
    values = RNG.integers(0, 256, (140, 2, 2), dtype=np.uint8)
    names = [f"{'ab'[i % 2]}/{i:04}.png" for i in range(140)]
    draw(tmp_path / "many", dict(zip(names, values, strict=True)))
    for reverse in (False, True):
        out = tmp_path / f"{reverse}.h5"
        import_images(pack(tmp_path / "many", tmp_path / "m.tar", reverse=reverse), out, None)
        assert np.array_equal(stored(out)[0][:, 0], np.concatenate([values[::2], values[1::2]]))


def test_other_files_are_ignored(images: Path, tmp_path: Path) -> None:
    others = ("README.md", "cat/Thumbs.db", "cat/._a.png", ".hidden/a.png", "__MACOSX/cat/a.png")
    for name in others:
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    import_images(images, tmp_path / "out.h5", None)
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
    import_images(tar, tmp_path / "out.h5", None)
    assert stored(tmp_path / "out.h5")[1] == LABELS
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "out.h5"])


# Refusals


def test_nothing_is_overwritten(split: Path, tmp_path: Path) -> None:
    (tmp_path / "out-test.h5").write_text("mine")
    with refuses(ConfigError, "import.output-exists"):
        import_images(split, tmp_path / "out.h5", None)
    assert (tmp_path / "out-test.h5").read_text() == "mine"
    assert not (tmp_path / "out.h5").exists()
    with refuses(ConfigError, "import.folder-missing"):
        import_images(split, tmp_path / "no/out.h5", None)


def test_wrong_sources(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    with refuses(DataError, "import.source-missing"):
        import_images(tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    with refuses(DataError, "import.no-images"):
        import_images(tmp_path / "empty", out)
    (tmp_path / "text").write_text("hello")
    with refuses(DataError, "import.tar-damaged"):
        import_images(tmp_path / "text", out)
    Image.new("RGB", (5, 5)).save(images / "cat/c.png")
    with refuses(DataError, "import.sizes-differ") as caught:
        import_images(images, out)
    assert "cat/c.png" in caught.value.message
    (images / "cat/c.png").unlink()
    (images / "cat/deep").mkdir()
    (images / "cat/a.png").rename(images / "cat/deep/a.png")
    with refuses(DataError, "import.image-misplaced") as caught:
        import_images(images, out)
    assert "cat/deep/a.png" in caught.value.message
    assert not list(tmp_path.glob("*.h5")) + list(tmp_path.glob(".*"))


def test_splits_of_other_names(split: Path, tmp_path: Path) -> None:
    (split / "test").rename(split / "val")
    with refuses(DataError, "import.split-ambiguous"):
        import_images(split, tmp_path / "o.h5", None)


def test_a_class_that_only_test_has(split: Path, tmp_path: Path) -> None:
    draw(split / "test", {"yak/1.png": PIXELS["cat/a.png"]})
    with refuses(DataError, "import.class-unknown"):
        import_images(split, tmp_path / "o.h5", None)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.9])
def test_damaged_images_leave_nothing(images: Path, tmp_path: Path, fraction: float) -> None:
    noise = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in ROWS:
        Image.fromarray(noise).save(images / name)
    content = (images / "dog/2.png").read_bytes()
    (images / "dog/2.png").write_bytes(content[: int(len(content) * fraction)])
    with refuses(DataError, "import.image-damaged") as caught:
        import_images(images, tmp_path / "out.h5", None)
    assert "dog/2.png" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_truncated_tars(images: Path, tmp_path: Path, fraction: float) -> None:
    tar = pack(images, tmp_path / "a.tar.gz")
    content = tar.read_bytes()
    tar.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(DataError) as caught:  # of an image or of the tar, by where it is cut
        import_images(tar, tmp_path / "out.h5", None)
    assert caught.value.key in ("import.image-damaged", "import.tar-damaged")
    assert not (tmp_path / "out.h5").exists()


def test_a_name_that_occurs_twice(images: Path, tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(images, ".")
        archive.add(images / "cat/a.png", "cat/a.png")
    with refuses(DataError, "import.image-twice") as caught:
        import_images(tar, tmp_path / "out.h5", None)
    assert "cat/a.png" in caught.value.message


def test_deep_pixels(images: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(images / "cat/a.png")
    with refuses(DataError, "import.image-depth") as caught:
        import_images(images, tmp_path / "out.h5", None)
    assert "cat/a.png" in caught.value.message


def test_without_pillow(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with refuses(DataError, "import.pillow-missing"):
        import_images(images, tmp_path / "o.h5", None)
