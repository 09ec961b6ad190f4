"""Statistics of a training split: the same bits whatever reads which piece, in bounded memory."""

from __future__ import annotations

import itertools
import json
import math
import time
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dtrain.data.array_source import MemorySource
from dtrain.data.checks.channel_notes import channel_notes
from dtrain.data.dataset import DatasetSplits, InputTargets, IntegerInputs, Subset
from dtrain.data.sampler import even_ranges
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.statistics import exact_sums as sums_module
from dtrain.data.statistics import statistics_pass as module
from dtrain.data.statistics.exact_sums import exact_sums
from dtrain.data.statistics.kept_statistics import (
    STATISTICS_FILE,
    from_lists,
    kept_text,
    read_kept,
)
from dtrain.data.statistics.shared_statistics import PassProgress
from dtrain.data.statistics.standardise import TrainingStatistics, find_standardised, standardise
from dtrain.data.statistics.statistics_pass import (
    StatisticsPass,
    StoredRows,
    channel_axis,
    compute_statistics,
)
from dtrain.errors import ConfigError, DataError
from dtrain.planning.plan import make_plan
from tests import tiny
from tests.refusals import refuses

RNG = np.random.default_rng(0)
DTYPES = ("uint8", "int8", "uint16", ">i2", "int32", "float16", "float32", "float64", "complex64")


def dataset(x: np.ndarray) -> SourceDataset:
    """Return samples in memory."""
    return SourceDataset(MemorySource(x), MemorySource(np.zeros(len(x), np.int64)), 2)


def numbers(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return numbers of any dtype around a mean that is not 0."""
    values = 40 * RNG.normal(size=shape) + 60
    if dtype.startswith("complex"):
        values = values + 1j * RNG.normal(size=shape)
    return values.clip(0, 120).astype(dtype)


def unit(x: np.ndarray) -> np.ndarray:
    """Return stored samples as inputs are, in the longest dtype."""
    return x.astype(complex if x.dtype.kind == "c" else float) / (255 if x.dtype == "uint8" else 1)


def per_channel(x: np.ndarray, axis: int) -> np.ndarray:
    """Return the numbers of each channel, (channels, ...)."""
    return np.moveaxis(x, 1 + axis, 0).reshape(x.shape[1 + axis], -1)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces small, so that a small set has many of them."""
    for name, value in (("SAMPLES_PER_READ", 7), ("EXACT_PIECE_BYTES", 2500)):
        monkeypatch.setattr(module, name, value)


# Values


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (700, 3, 5), (2000, 7, 1), (4, 1500, 1), (9, 2, 33), (5, 3, 784), (1, 2, 300_001)],
)
def test_sums_of_small_integers_are_exact(dtype: str, shape: tuple[int, ...]) -> None:
    limits = np.iinfo(dtype)
    random = RNG.integers(limits.min, limits.max + 1, shape).astype(dtype)
    for x in (random, np.full(shape, limits.min, dtype), np.full(shape, limits.max, dtype)):
        wide = x.astype(np.int64)
        assert np.array_equal(exact_sums(x), [wide.sum((0, 2)), (wide**2).sum((0, 2))])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_share_of_pieces_gives_the_same_bits(dtype: str, axis: int) -> None:
    x = numbers((61, 3, 4, 11), dtype)
    reading = StatisticsPass(StoredRows(x), axis)
    assert len(reading.pieces) > 3
    expected = compute_statistics(StoredRows(x), axis)
    for ranks in (1, 2, 3, 20):
        shares = [even_ranges(len(reading.pieces), ranks)[rank] for rank in range(ranks)]
        parts = [reading.sum_pieces(reading.pieces[s.start : s.stop]) for s in shares]
        result = reading.combine(list(itertools.chain(*parts)))
        assert np.array_equal(result.mean, expected.mean)
        assert np.array_equal(result.deviation, expected.deviation)
    values = per_channel(unit(x), axis)
    np.testing.assert_allclose(expected.mean, values.mean(1), rtol=1e-13)
    np.testing.assert_allclose(expected.deviation, values.std(1), rtol=1e-12)


def plain_moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the moments as every earlier version of dtrain computed them."""
    origin = x[0].reshape(x.shape[1], -1)[:, :1].astype(np.float64)
    count, total, square = 0, np.zeros(len(origin)), np.zeros(len(origin))
    for start in range(0, len(x), 4096):
        batch = x[start : start + 4096]
        values = np.moveaxis(batch, 1, 0).reshape(len(origin), -1) - origin
        count += values.shape[1]
        total += values.sum(axis=1)
        square += np.square(values).sum(axis=1)
    shift = total / count
    return origin[:, 0] + shift, np.sqrt(np.maximum(square / count - shift**2, 0.0))


@pytest.mark.parametrize(
    "shape", [(8200, 7), (4097, 1), (9, 3, 1, 1), (5000, 1, 8, 8), (4100, 3, 5, 7), (1, 3, 4)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_keep_the_bits_of_earlier_versions(shape: tuple[int, ...], dtype: str) -> None:
    x = numbers(shape, dtype)
    ours = compute_statistics(dataset(x)).moments
    assert all(np.array_equal(*pair) for pair in zip(ours, plain_moments(x), strict=True))


def test_constant_and_shifted_channels() -> None:
    noise = RNG.normal(size=1000)
    x = np.stack([np.full(1000, 0.1), 1e8 + noise], axis=1)
    mean, deviation = compute_statistics(StoredRows(x)).moments
    assert deviation[0] == 0.0
    np.testing.assert_allclose(mean, [0.1, 1e8 + noise.mean()])
    np.testing.assert_allclose(deviation[1], noise.std(), rtol=1e-6)
    full = np.full((300, 2), 255, np.uint8)
    assert compute_statistics(dataset(full)).deviation.tolist() == [0, 0]
    assert compute_statistics(StoredRows(full), stored_units=True).mean.tolist() == [255, 255]


def test_a_part_of_a_split_has_statistics_of_its_own() -> None:
    x = numbers((50, 2, 3), "uint8")
    part = Subset(dataset(x), np.array([3, 4, 40]))
    expected = per_channel(unit(x[[3, 4, 40]]), 0)
    np.testing.assert_allclose(compute_statistics(part).mean, expected.mean(1), rtol=1e-14)


# Memory


class CountingRows(StoredRows):
    """Zeros that are made as they are read, and the bytes of the largest read."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(np.broadcast_to(np.zeros((), dtype), shape))
        self.largest = 0

    def read_stored(self, rows: range) -> np.ndarray:
        samples = np.ascontiguousarray(super().read_stored(rows))
        self.largest = max(self.largest, samples.nbytes)
        return samples


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("uint8", 1), ("uint8", 2)])
@pytest.mark.parametrize("shape", [(64, 1, 256, 256), (64, 3, 256, 256), (5000, 900)])
def test_memory_is_bounded_whatever_the_size_of_a_sample(
    dtype: str, threads: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    piece, row_bytes = 2**19, math.prod(shape[1:]) * np.dtype(dtype).itemsize
    for name in ("PIECE_BYTES", "MAX_PIECE_BYTES", "EXACT_PIECE_BYTES"):
        monkeypatch.setattr(module, name, piece)
    monkeypatch.setattr(sums_module, "BLOCK", 2**16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows = CountingRows(shape, dtype)
    tracemalloc.start()
    compute_statistics(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    piece = max(piece, row_bytes)
    assert rows.largest <= piece
    # float64 numbers of a piece; or 256 rows of 1,024 float32 numbers per thread
    temporary = 2 * piece if dtype == "float32" else threads * 2**20
    assert peak < (threads + 2) * piece + temporary + 2**18


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", "complex128"])
@pytest.mark.parametrize(
    "shape", [(10**5, 3), (10**5, 3, 32, 32), (4096, 1, 48, 48, 48), (9, 1, 2100, 2100)]
)
def test_a_piece_has_at_most_64_megabytes_or_one_sample(shape: tuple[int, ...], dtype: str) -> None:
    rows = CountingRows(shape, dtype)
    pieces = StatisticsPass(rows).pieces
    assert list(itertools.chain(*pieces))[::997] == list(range(0, shape[0], 997))
    assert max(map(len, pieces)) * rows.largest <= max(2**26, rows.largest)


# Channels


@pytest.mark.parametrize(("channels", "axis"), [("first", 0), ("last", 2), (0, 0), (1, 1), (2, 2)])
def test_each_channel_is_standardised_and_samples_keep_their_shape(
    channels: str | int, axis: int
) -> None:
    scale = 1 + np.arange(7 if axis == 2 else 3 if axis == 0 else 5)
    shape = [1, 1, 1]
    shape[axis] = -1
    x = (RNG.normal(size=(40, 3, 5, 7)) * scale.reshape(shape) + scale.reshape(shape)).astype("f4")
    splits = standardise(DatasetSplits(dataset(x), dataset(x[:9])), channels)  # type: ignore[arg-type]
    inputs = splits.train.inputs(range(40)).numpy()
    assert inputs.shape == x.shape
    rows = per_channel(inputs, axis)
    np.testing.assert_allclose(rows.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(rows.std(1), 1, rtol=1e-5)
    train = find_standardised(splits.train)
    test = find_standardised(splits.test)
    assert train is not None
    assert test is not None
    saved = train.statistics()
    restored = (torch.from_numpy(x[:9]) - saved["mean"]) / saved["std"]
    torch.testing.assert_close(splits.test.inputs(range(9)), restored.float())
    test.use_statistics({"mean": saved["mean"] + 1, "std": saved["std"]})
    assert not torch.equal(splits.test.inputs(range(9)), restored)


def test_complex_inputs_have_a_complex_mean_and_a_real_deviation() -> None:
    x = numbers((30, 2, 4), "complex64")
    splits = standardise(DatasetSplits(dataset(x), dataset(x)))
    inputs = splits.train.inputs(range(30)).numpy()
    rows = per_channel(inputs, 0)
    assert inputs.dtype == np.complex64
    np.testing.assert_allclose(rows.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose((np.abs(rows) ** 2).mean(1), 1, rtol=1e-5)


@pytest.mark.parametrize("channels", [3, 4, -1])
def test_an_axis_that_samples_have_not_is_refused(channels: int) -> None:
    with refuses(ConfigError, "data.channels-axis"):
        channel_axis(channels, (3, 4, 5))


def test_keys_of_channels() -> None:
    assert "channels" not in tiny.run(data__channels="first").to_table()["data"]
    assert tiny.run(data__channels="last").to_table()["data"]["channels"] == "last"
    with refuses(ConfigError, "data.channels-negative"):
        tiny.run(data__channels=-1)
    with refuses(ConfigError, "run-file.wrong-type"):
        tiny.run(data__channels="middle")
    with refuses(ConfigError, "data.augment-channels"):
        tiny.run(data__channels="last", data__augment="crop-flip")
    plan = make_plan(tiny.run(data__channels="last"), 1)
    train = find_standardised(plan.data.train)
    assert train is not None
    assert train.statistics()["mean"].shape == (1, 5)


@pytest.mark.parametrize("channels", ["first", "last"])
def test_statistics_of_a_file_belong_to_an_axis(channels: str, tmp_path: Path) -> None:
    x = numbers((20, 6, 2), "float32")
    for name in ("train", "test"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"], file["y"] = x, np.arange(20) % 2
            file.attrs["mean"], file.attrs["std"] = [1.0, 2.0], [2.0, 4.0]
    data = {"name": "hdf5", "train": str(tmp_path / "train.h5"), "test": str(tmp_path / "test.h5")}
    run = tiny.run(data=data | {"channels": channels})
    if channels == "first":
        with refuses(DataError, "data.statistics-shape"):
            make_plan(run, 1)
        return
    inputs = make_plan(run, 1).data.test.inputs([3]).numpy()
    np.testing.assert_allclose(inputs, (x[[3]] - [1, 2]) / [2, 4], rtol=1e-5)


def test_models_that_take_integers_need_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StatisticsPass, "__init__", None)
    split = dataset(numbers((9, 4), "uint8"))
    train = standardise(DatasetSplits(split, split)).train
    assert find_standardised(IntegerInputs(train)) is None
    assert find_standardised(InputTargets(train)) is train
    assert IntegerInputs(train).inputs([1]).dtype == torch.int64


# Numbers that are not finite, and channels that hold no information


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_numbers_that_are_not_finite_are_counted_and_located(value: float, axis: int) -> None:
    x = numbers((50, 3, 4), "float32")
    x[[41, 41, 33, 33], [2, 0, 1, 2], [1, 1, 3, 0]] = value
    place = compute_statistics(StoredRows(x), axis).not_finite
    assert place is not None
    assert (place.count, place.sample, place.channel) == (4, 33, (1, 3)[axis])
    assert place.value == str(np.float32(value))
    assert compute_statistics(StoredRows(x[:33]), axis).not_finite is None
    assert compute_statistics(StoredRows(np.full((9, 1), 1e200))).not_finite is None
    large = np.array([[0.0], [1e200]])  # its square is infinite, but no number is
    assert compute_statistics(StoredRows(large)).not_finite is None


def notes(x: np.ndarray, axis: int = 0) -> list[str]:
    """Return the notes on the channels of samples."""
    return list(channel_notes(TrainingStatistics(dataset(x), axis)))


SCALES = np.array([1.0, 30.0, 0.1, 5.0])
SERIES = RNG.normal(size=(50, 30, 4)) * SCALES
MELS = np.exp(-np.arange(16) / 3)[:, None] * RNG.gamma(1, 1, (50, 16, 40))


@pytest.mark.parametrize(
    ("x", "count"),
    [
        (numbers((5, 28, 28, 1), "uint8"), 1),
        (numbers((5, 24, 32, 3), "uint8"), 1),
        (numbers((5, 12, 12, 12, 1), "float32"), 1),
        (SERIES, 1),
        (MELS.swapaxes(1, 2), 1),
        (numbers((5, 1, 8, 8), "uint8"), 0),
        (numbers((5, 3, 32, 32), "uint8"), 0),
        (numbers((5, 64, 8, 4), "float32"), 0),
        (numbers((5, 1, 28, 28), "float32"), 0),
        (numbers((5, 28, 28), "float32") * np.hanning(30)[1:-1], 0),
        (MELS, 0),
        (SERIES.swapaxes(1, 2), 0),
        (RNG.normal(size=(50, 30, 4)), 0),
        (numbers((5, 20), "float32"), 0),
    ],
)
def test_channels_that_are_last_are_noted(x: np.ndarray, count: int) -> None:
    assert len(notes(x)) == count
    assert notes(x, x.ndim - 2) == []  # channels = "last"


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_constant_channels_are_named(dtype: str) -> None:
    x = numbers((20, 16), dtype)
    assert notes(x) == []
    x[:, 3] = 7
    [note] = notes(x)
    assert "channel 3 of 16 is" in note
    x[:, :12] = 7
    [note] = notes(x)
    assert "(12) of 16 are" in note


# Kept statistics


@pytest.mark.parametrize("dtype", ["uint8", "float32", "complex64"])
def test_kept_statistics_are_used_for_their_data_alone(dtype: str, tmp_path: Path) -> None:
    x = numbers((100, 3, 3), dtype)
    training = TrainingStatistics(dataset(x))
    assert read_kept(tmp_path, training) is None
    assert training.moments is training.moments
    (tmp_path / STATISTICS_FILE).write_text(kept_text(training))
    again = TrainingStatistics(dataset(x.copy()))
    kept = read_kept(tmp_path, again)
    assert kept is not None
    assert all(map(np.array_equal, from_lists(kept), training.moments))
    changed = x.copy()
    changed[-1, 2, 2] += 1
    others = [
        TrainingStatistics(dataset(changed)),
        TrainingStatistics(dataset(x[:99])),
        TrainingStatistics(dataset(x), 1),
        TrainingStatistics(dataset(x.reshape(100, 9))),
        TrainingStatistics(dataset(x.astype("complex128"))),
    ]
    assert [read_kept(tmp_path, other) for other in others] == [None] * 5
    for damage in ("{", "[]", json.dumps({"mean": [0]})):
        (tmp_path / STATISTICS_FILE).write_text(damage)
        assert read_kept(tmp_path, again) is None


# Announcements


@pytest.mark.parametrize(("piece_s", "count"), [(0.001, 0), (0.02, 0), (0.1, 1), (1.0, 5)])
def test_a_pass_that_takes_long_is_announced(
    piece_s: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, printed = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    source = MemorySource(np.zeros((2, 2)), "big.h5")
    split = SourceDataset(source, MemorySource(np.zeros(2, np.int64)), 2)
    progress = PassProgress(TrainingStatistics(split), printed.append)
    for done in range(1, 101):
        clock[0] += piece_s
        progress(done, 100)
    assert len(printed) == count
    assert ["dtrain data stats big.h5" in line for line in printed] == [True, *[False] * 4][:count]
