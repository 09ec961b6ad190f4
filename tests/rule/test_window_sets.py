"""Texts and series: windows are those of the file, splits share no step, files are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dtrain import data
from dtrain.cli import main
from dtrain.data import load_data, open_samples
from dtrain.data.dataset import DatasetSplits
from dtrain.data.importing import text_stream
from dtrain.data.importing.import_data import ImportOptions, import_data
from dtrain.data.node_memory import choose_held, stored_arrays
from dtrain.data.statistics.standardise import unstandardised
from dtrain.data.tools.file_description import describe_file
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.task import Task
from tests.need import lack
from tests.refusals import refuses

TEXT = "Wär' nicht das Auge sonnenhaft, die Sonne könnt' es nie erblicken. " * 3
MSE = Task("mse")


def load(folder: Path, name: str, task: Task | None = None, **keys: Any) -> DatasetSplits:
    validation = keys.pop("validation", 0.0)
    options = {} if task is None else {"task": task}
    return load_data(name, keys, folder, normalise=False, validation=validation, **options)


def rows(split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return samples and targets of a split, read in another order."""
    order = np.random.default_rng(0).permutation(split.size)
    back = np.argsort(order)
    whole = split.read_stored(range(split.size)).reshape(split.size, *split.shape)
    x, y = split.read_stored(order).reshape(whole.shape)[back], split.targets(order)[back].numpy()
    assert np.array_equal(x, whole)
    return x, y


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


# Texts


@pytest.mark.parametrize("stride", [None, 3])
def test_windows_of_bytes_are_those_of_the_file(folder: Path, stride: int | None) -> None:
    """The next token of each token; the end of the text is held out, and no split overlaps one."""
    tokens = np.frombuffer(TEXT.encode(), np.uint8)
    splits = load(folder, "text", train="a.txt", length=8, stride=stride, test=0.2, validation=0.25)
    assert splits.validation is not None
    assert splits.train.classes == 256
    stop = len(tokens) - round(0.2 * len(tokens))
    middle = stop - round(0.25 * stop)
    for split, start, end in (
        (splits.train, 0, middle),
        (splits.validation, middle, stop),
        (splits.test, stop, len(tokens)),
    ):
        x, y = rows(split)
        starts = range(start, end - 8, stride or 8)
        assert np.array_equal(x, [tokens[i : i + 8] for i in starts])
        assert np.array_equal(y, [tokens[i + 1 : i + 9] for i in starts])


@pytest.mark.parametrize("kind", ["text", "bytes", "characters"])
def test_characters_and_files_of_tokens(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of tokens is mapped and gives the tokens of its text; pieces may part a character."""
    monkeypatch.setattr(text_stream, "PIECE_BYTES", 7)
    names = sorted({*TEXT}) if kind != "bytes" else list(map(chr, range(256)))
    if kind == "text":
        splits = load(folder, "text", train="a.txt", length=8, test=0.2, tokens="characters")
        expected = TEXT
    else:
        options = ImportOptions(tokens=kind)  # type: ignore[arg-type]
        [path] = import_data(folder / "a.txt", folder / "a.h5", options)
        splits = load(folder, "text", train="a.h5", length=8, test=0.2)
        expected = TEXT if kind == "characters" else TEXT.encode().decode("latin-1")
        assert all(array.source.is_mapped for array in stored_arrays(splits.by_name()))
        table = describe_file(path)
        assert sum(table["targets"]["tokens"]["counts"].values()) == len(expected)
        assert len(table["class_names"]) == len(names)
    x, y = rows(splits.train)
    assert splits.train.classes == len(names)
    assert x.dtype.itemsize <= 8
    text = "".join(names[number] for number in x.ravel().astype(int))
    assert expected.startswith(text)
    assert np.array_equal(x[:, 1:], y[:, :-1])


def test_several_texts_are_one_split(folder: Path) -> None:
    """A window lies in one file; one that is too short for a window gives none."""
    (folder / "b.txt").write_text("abcdefghij")
    (folder / "c.txt").write_text("abc")
    paths = ("c.txt", "b.txt", "a.txt")
    splits = load(folder, "text", train=paths, length=3, test="b.txt")
    x, _ = rows(splits.train)
    assert [bytes(row.astype(np.uint8)) for row in x[:3]] == [b"abc", b"def", b"ghi"]
    assert x.shape[0] == 3 + (len(TEXT.encode()) - 1) // 3
    assert splits.test.size == 3


def test_a_text_is_described_and_predicted_on(folder: Path, capsys: Any) -> None:
    counts = describe_file(folder / "a.txt")["targets"]["bytes"]["counts"]
    assert counts[str(ord("S"))] == TEXT.count("S")
    keys = {"train": "a.txt", "test": 0.2, "length": 8}
    [samples] = open_samples(folder / "a.txt", "text", keys, folder, Task())
    assert samples.shape == (len(TEXT.encode()) // 8, 8)
    assert main(["data", "import", str(folder / "a.txt"), str(folder / "b.h5")]) == 0
    assert main(["data", "describe", str(folder / "b.h5")]) == 0
    assert "tokens" in capsys.readouterr().out


# Series


def write_series(folder: Path, name: str = "a.csv") -> np.ndarray:
    """Write a table of a date and three numbers, or the numbers to HDF5; return the numbers."""
    values = np.random.default_rng(0).normal(size=(60, 3)).round(3)
    if name.endswith("csv"):
        lines = [f"2020-01-{i:02},{a},{b},{c}" for i, (a, b, c) in enumerate(values)]
        (folder / name).write_text("\n".join(["date,load,wind,sun", *lines]))
    else:
        with h5py.File(folder / name, "w") as file:
            file.create_dataset("x", data=values, chunks=(7, 3) if "chunks" in name else None)
    return values


@pytest.mark.parametrize("name", ["a.csv", "a.h5", "chunks.h5"])
def test_windows_of_a_series_are_those_of_the_table(folder: Path, name: str) -> None:
    values = write_series(folder, name)
    splits = load(folder, "series", MSE, train=name, length=5, horizon=2, test=0.25)
    for split, part in ((splits.train, values[:45]), (splits.test, values[45:])):
        x, y = rows(split)
        starts = range(len(part) - 6)
        assert np.array_equal(x, [part[i : i + 5] for i in starts])
        assert np.array_equal(y, [part[i + 5 : i + 7] for i in starts])
    assert splits.train.target_shape == (2, 3)


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("name", ["a.csv", "a.h5"])
def test_columns_of_a_series_are_chosen(folder: Path, name: str, is_list: bool) -> None:
    values = write_series(folder, name)
    named = {"features": ("load", "sun"), "target": ("wind",) if is_list else "wind"}
    numbered = {"features": (0, 2), "target": (1,) if is_list else 1}
    columns = named if name == "a.csv" else numbered
    splits = load(folder, "series", MSE, train=name, length=5, stride=4, test=0.25, **columns)
    x, y = rows(splits.train)
    assert np.array_equal(x, [values[i : i + 5, [0, 2]] for i in range(0, 40, 4)])
    column: Any = [1] if is_list else 1
    assert np.array_equal(y, [values[i + 5 : i + 6, column] for i in range(0, 40, 4)])


def test_channels_of_a_series_are_standardised(folder: Path) -> None:
    values = write_series(folder)
    keys = {"train": "a.csv", "length": 5, "test": 0.25}
    train = load_data("series", keys, folder, task=MSE).train
    windows = np.stack([values[i : i + 5] for i in range(40)])
    moments = windows.mean((0, 1)), windows.std((0, 1))
    expected = torch.from_numpy((windows - moments[0]) / moments[1])
    torch.testing.assert_close(train.inputs(np.arange(40)), expected)
    assert unstandardised(train).shape == (5, 3)


def test_windows_are_not_held_a_second_time(folder: Path) -> None:
    write_series(folder)
    splits = load(folder, "series", MSE, train="a.csv", length=20, test=0.5)
    arrays = stored_arrays(splits.by_name())
    assert choose_held(arrays, 1 << 40, owned=True) == []
    train = [array.source for array in arrays if array.split == "train"]
    assert sum(source.stored_bytes for source in train) == 29 * 3 * 8


@pytest.mark.parametrize(
    ("name", "keys", "key"),
    [
        ("text", {"train": "a.txt", "test": 0.2, "length": 0}, "data.steps"),
        ("text", {"train": "a.txt", "test": 0.2, "stride": -1}, "data.steps"),
        ("text", {"train": "a.txt"}, "data.no-test-split"),
        ("text", {"train": "a.txt", "test": 0.01, "length": 50}, "data.no-windows"),
        ("text", {"train": "no.txt", "test": 0.2}, "data.file-missing"),
        (
            "text",
            {"train": "a.csv", "test": "a.txt", "tokens": "characters"},
            "data.character-unknown",
        ),
        ("text", {"train": "a.bin", "test": 0.5, "tokens": "characters"}, "data.text-encoding"),
        ("text", {"train": "a.h5", "test": 0.2}, "data.hdf5-dataset-missing"),
        ("text", {"train": "t.h5", "test": 0.2}, "data.tokens-form"),
        ("text", {"train": "a.h5", "test": 0.2, "tokens": "bytes"}, "data.tokens-of-file"),
        ("text", {"train": "a.txt", "test": 0.2, "tokens": "words"}, "run-file.wrong-type"),
        ("series", {"train": "a.csv", "test": 0.2, "horizon": 0}, "data.steps"),
        ("series", {"train": "a.csv", "test": 0.2, "target": "wave"}, "data.no-column"),
        ("series", {"train": "a.h5", "test": 0.2, "target": "sun"}, "data.no-column"),
        ("series", {"train": "a.h5", "test": 0.2, "target": 3}, "data.no-column"),
        ("series", {"train": "t.h5", "test": 0.2, "x": "tokens"}, "data.series-shape"),
        ("series", {"train": "words.csv", "test": 0.2}, "data.series-no-numbers"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    folder: Path, name: str, keys: dict[str, Any], key: str
) -> None:
    write_series(folder)
    write_series(folder, "a.h5")
    (folder / "a.bin").write_bytes(b"\xff\xfe" * 40)
    (folder / "words.csv").write_text("one,two\nthree,four\n")
    with h5py.File(folder / "t.h5", "w") as file:
        file["tokens"] = np.linspace(0, 1, 50)
    errors = (
        ConfigError if key in ("data.steps", "data.no-test-split", "data.no-column") else DataError
    )
    if key in ("run-file.wrong-type", "data.tokens-of-file"):
        errors = ConfigError
    with refuses(errors, key):
        load(folder, name, MSE if name == "series" else None, **keys)


def test_an_import_refuses_options_of_other_sources(folder: Path) -> None:
    write_series(folder)
    (folder / "empty.txt").touch()
    for source, options, key in (
        ("a.csv", ImportOptions(tokens="bytes"), "import.option-unused"),
        ("a.txt", ImportOptions(target="0"), "import.option-unused"),
        ("empty.txt", ImportOptions(), "import.text-empty"),
    ):
        errors = DataError if key == "import.text-empty" else ConfigError
        with refuses(errors, key):
            import_data(folder / source, folder / "b.h5", options)


def test_functions_of_python_name_the_sets() -> None:
    assert data.text("a.txt", 0.1, length=8) == {
        "name": "text", "train": "a.txt", "test": 0.1, "length": 8,
    }  # fmt: skip
    assert data.series(Path("a.csv"), "b.csv", horizon=2) == {
        "name": "series", "train": "a.csv", "test": "b.csv", "horizon": 2,
    }  # fmt: skip


def test_tinyshakespeare_has_65_characters(data_dir: Path) -> None:
    path = data_dir / "tinyshakespeare.txt"
    if not path.is_file():
        lack("data", f"no {path}")
    splits = load(data_dir, "text", train=path.name, tokens="characters", test=0.1)
    assert splits.train.classes == 65
    assert splits.train.size == 1_003_854 // 128
