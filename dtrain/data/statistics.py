"""Mean and deviation per channel of a training split, and the splits that they standardise.

Invariant: a split is read in pieces of bounded memory. Sums of small integers are exact, so any
pieces give the same bits. The pieces of other numbers depend on size, shape and dtype alone, and
their sums are combined in order. So the bits do not depend on which rank reads which piece.

::

    pieces of the split   0   1   2 | 3   4   5 | 6   7      three ranks, a share of pieces each
    sums per channel      s0  s1  s2  s3  s4  s5  s6  s7
    combined              ((s0 + s1) + s2) + ...             on all ranks, in this order
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtrain.data.conversion import Array, to_summable
from dtrain.data.dataset import (
    SAMPLES_PER_READ,
    Dataset,
    DatasetSplits,
    DatasetView,
    InputTargets,
    Moments,
)
from dtrain.data.exact_sums import exact_sums, has_exact_sums
from dtrain.errors import ConfigError, DataError

Channels = Literal["first", "last"] | int
"""The axis of a sample along which statistics are kept, as `[data] channels` has it."""


EXACT_PIECE_BYTES = 2**24
"""Bytes of a piece of small integers, unless one sample is larger."""


PIECE_BYTES = 2**25
"""Bytes of a piece of other numbers, unless one sample is larger."""


MAX_PIECE_BYTES = 2**26
"""Bytes up to which a piece of other numbers has `SAMPLES_PER_READ` samples."""


MAX_EXACT_THREADS = 4
"""Threads that add up small integers; other numbers take more memory, and one thread."""


class SampleSource(Protocol):
    """Samples that are read in pieces, as `Dataset.read_stored` does."""

    @property
    def size(self) -> int:
        """Number of samples."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    @property
    def chunk_rows(self) -> int | None:
        """Samples of a stored piece that is read as a whole."""

    def read_stored(self, rows: range) -> Array:
        """Read consecutive samples, (n, *shape)."""


@final
class StoredRows:
    """The rows of an array or of an HDF5 dataset as a `SampleSource`.

    Parameters
    ----------
    rows : array or HDF5 dataset
        (n, ...); sliced piece by piece.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.size, self.shape = rows.shape[0], tuple(rows.shape[1:])
        chunks = getattr(rows, "chunks", None)
        self.chunk_rows = None if chunks is None else int(chunks[0])

    def read_stored(self, rows: range) -> Array:
        """Read consecutive samples, (n, *shape)."""
        return to_summable(self._rows[rows.start : rows.stop])


@final
@dataclass(frozen=True)
class NotFinite:
    """Numbers that are NaN or infinite: how many there are, and where the first one is."""

    count: int
    sample: int
    channel: int
    value: str


@final
@dataclass(frozen=True)
class PieceSums:
    """Sums over one piece, or over several pieces of integers.

    Attributes
    ----------
    sums : array
        (rows, channels). Integers: sum and sum of squares, exact. Others: sum and sum of squares of
        the differences to each channel's origin; of complex numbers real part, imaginary part and
        squared modulus.
    not_finite : NotFinite or None
        None where all numbers are finite.
    """

    sums: NDArray[Any]
    not_finite: NotFinite | None = None


@final
@dataclass(frozen=True)
class Statistics:
    """Mean and deviation per channel, and numbers that spoil them.

    Attributes
    ----------
    mean, deviation : array
        (channels,), in the units of the inputs.
    not_finite : NotFinite or None
        None where all numbers are finite.
    """

    mean: NDArray[Any]
    deviation: NDArray[np.float64]
    not_finite: NotFinite | None = None

    @property
    def moments(self) -> Moments:
        """Mean and deviation."""
        return self.mean, self.deviation


def channel_axis(channels: Channels, shape: tuple[int, ...]) -> int:
    """Return the axis of a sample that `[data] channels` names.

    Raises
    ------
    ConfigError
        A sample has no such axis.
    """
    axis = {"first": 0, "last": len(shape) - 1}.get(str(channels), channels)
    if isinstance(axis, int) and 0 <= axis < len(shape):
        return axis
    raise ConfigError(
        "data.channels-axis",
        f"[data] channels = {channels!r}, but samples have shape {shape}: give "
        f'"first", "last" or an axis from 0 to {len(shape) - 1}',
    )


@final
class StatisticsPass:
    """One pass over the samples of a split, or over a share of its pieces.

    Parameters
    ----------
    source : SampleSource
        The samples; the first one is read.
    axis : int
        The axis of a sample that holds the channels.
    stored_units : bool
        Give bytes their statistics from 0 to 255; otherwise from 0 to 1, as inputs are.

    Attributes
    ----------
    pieces : list of range
        The samples of each piece.
    """

    def __init__(self, source: SampleSource, axis: int = 0, *, stored_units: bool = False) -> None:
        self._source, self._axis = source, axis
        first = source.read_stored(range(1))
        self._dtype = first.dtype
        self._scale = 255 if first.dtype == np.uint8 and not stored_units else 1
        self.is_exact = has_exact_sums(first.dtype)
        self.channels = source.shape[axis]
        kind = np.complex128 if first.dtype.kind == "c" else np.float64
        self._origin = np.moveaxis(first[0], axis, 0).reshape(self.channels, -1)[:, :1].astype(kind)
        rows = _rows_per_piece(first.nbytes, self.is_exact, source.chunk_rows)
        self.pieces = [
            range(start, min(start + rows, source.size)) for start in range(0, source.size, rows)
        ]

    def sum_pieces(
        self, pieces: Sequence[range], report: Callable[[int, int], None] | None = None
    ) -> list[PieceSums]:
        """Read pieces and return their sums in order; those of integers are added up.

        Threads add up earlier pieces while this one reads the next.

        Parameters
        ----------
        report : callable, optional
            Called with the number of pieces that are done and that of all, after each piece.
        """
        sums = list[PieceSums]()
        for done, piece_sums in enumerate(self._sums_in_order(pieces), start=1):
            sums.append(piece_sums)
            if self.is_exact and len(sums) > 1:
                sums = [_add_exact(*sums)]
            if report is not None:
                report(done, len(pieces))
        return sums

    def _sums_in_order(self, pieces: Sequence[range]) -> Iterator[PieceSums]:
        """Yield the sums of pieces; at most one piece more is in memory than there are threads."""
        threads = min(MAX_EXACT_THREADS, torch.get_num_threads()) if self.is_exact else 1
        running = deque[Future[PieceSums]]()
        with ThreadPoolExecutor(threads, "dtrain-statistics") as pool:
            for piece in pieces:
                rows = self._source.read_stored(piece)
                if len(running) == threads:
                    yield running.popleft().result()
                running.append(pool.submit(self._sum, rows, piece.start))
                del rows
            while running:
                yield running.popleft().result()

    def combine(self, sums: Sequence[PieceSums]) -> Statistics:
        """Return the statistics of all pieces, whose sums are in order."""
        places = [each.not_finite for each in sums if each.not_finite is not None]
        not_finite = None
        if places:
            first = min(places, key=lambda place: place.sample)
            not_finite = dataclasses.replace(first, count=sum(place.count for place in places))
        count = self._source.size * math.prod(self._source.shape) // self.channels
        if self.is_exact:
            total = _add_exact(*sums).sums if len(sums) > 1 else sums[0].sums
            return Statistics(*_exact_moments(total, count, self._scale), not_finite)
        total = np.zeros((3 if self._dtype.kind == "c" else 2, self.channels))
        with np.errstate(invalid="ignore", over="ignore"):
            for each in sums:
                total += each.sums
            return Statistics(*_moments(total, count, self._origin[:, 0]), not_finite)

    def _sum(self, rows: Array, start: int) -> PieceSums:
        rows = np.ascontiguousarray(rows)
        if self.is_exact:
            shape = rows.shape[1:]
            outer = len(rows) * math.prod(shape[: self._axis])
            return PieceSums(exact_sums(rows.reshape(outer, self.channels, -1)))
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.stack(_centred_sums(np.moveaxis(rows, 1 + self._axis, 0), self._origin))
        is_finite = bool(np.isfinite(sums).all())
        return PieceSums(sums, None if is_finite else _find_not_finite(rows, start, self._axis))


def compute_statistics(
    source: SampleSource,
    axis: int = 0,
    *,
    stored_units: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Compute the statistics of samples by reading all of them once.

    Parameters
    ----------
    source, axis, stored_units
        As in `StatisticsPass`.
    report
        As in `StatisticsPass.sum_pieces`.
    """
    reading = StatisticsPass(source, axis, stored_units=stored_units)
    return reading.combine(reading.sum_pieces(reading.pieces, report))


def _rows_per_piece(row_bytes: int, is_exact: bool, chunk_rows: int | None) -> int:
    """Return the samples of a piece: whole chunks where the pieces are free to choose."""
    if is_exact:
        rows = max(1, EXACT_PIECE_BYTES // row_bytes)
        return rows - rows % chunk_rows if chunk_rows and chunk_rows <= rows else rows
    if SAMPLES_PER_READ * row_bytes <= MAX_PIECE_BYTES:
        return SAMPLES_PER_READ
    return max(1, PIECE_BYTES // row_bytes)


def _centred_sums(values: Array, origin: Array) -> list[Array]:
    """Return sums over all but the first axis of numbers less their channel's origin, then those of
    their squares.

    Differences to a number of the channel: a constant channel has a deviation of exactly 0, and a
    small deviation is not lost beside a large mean.
    """
    if values[0, 0].size == 1:
        return _row_sums(values.reshape(len(values), -1) - origin)
    # One channel at a time, since its copy takes memory.
    rows = [_row_sums(v.reshape(1, -1) - o) for v, o in zip(values, origin, strict=True)]
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def _row_sums(values: Array) -> list[Array]:
    """Return sums of rows and of their squares; complex sums as real and imaginary parts."""
    if values.dtype.kind == "c":
        total = values.sum(axis=1)
        squares = np.square(values.real) + np.square(values.imag)
        return [total.real, total.imag, squares.sum(axis=1)]
    total = values.sum(axis=1)
    return [total, np.multiply(values, values, out=values).sum(axis=1)]


def _find_not_finite(rows: Array, start: int, axis: int) -> NotFinite | None:
    """Return where the numbers are that are NaN or infinite; None where only a sum overflowed."""
    is_bad = ~np.isfinite(rows)
    count = int(np.count_nonzero(is_bad))
    if not count:
        return None
    place = np.unravel_index(int(np.argmax(is_bad)), is_bad.shape)
    return NotFinite(count, start + int(place[0]), int(place[1 + axis]), str(rows[place]))


def _add_exact(*sums: PieceSums) -> PieceSums:
    """Add sums of integers, in Python's integers: those of a large set exceed 64 bits."""
    return PieceSums(np.add.reduce([each.sums.astype(object) for each in sums]))


def _exact_moments(sums: NDArray[Any], count: int, scale: int) -> Moments:
    """Return mean and deviation of integers over a scale, each rounded once."""
    pairs = [(int(total), int(square)) for total, square in sums.T]
    mean = [total / (count * scale) for total, _ in pairs]
    variance = [(count * q - s * s) / (count * scale) ** 2 for s, q in pairs]
    return np.array(mean), np.sqrt(variance)


def _moments(sums: NDArray[Any], count: int, origin: NDArray[Any]) -> Moments:
    """Return mean and deviation from sums of differences to an origin."""
    shift = sums[0] / count
    if len(sums) == 3:
        shift = shift + 1j * (sums[1] / count)
    variance = np.maximum(sums[-1] / count - np.square(shift.real), 0.0)
    if len(sums) == 3:
        variance = np.maximum(variance - np.square(shift.imag), 0.0)
    return origin + shift, np.sqrt(variance)


@final
class TrainingStatistics:
    """The moments of a training split: given, set, or computed on first need.

    Parameters
    ----------
    dataset : Dataset
        The training split, not standardised.
    axis : int
        The axis of a sample that holds the channels.
    """

    def __init__(self, dataset: Dataset, axis: int = 0) -> None:
        self.dataset, self.axis = dataset, axis
        self._moments = dataset.given_moments
        if self._moments is not None and len(self._moments[0]) != dataset.shape[axis]:
            raise DataError(
                "data.statistics-shape",
                f"the training split comes with the statistics of {len(self._moments[0])} "
                f"channels, but samples of shape {dataset.shape} have {dataset.shape[axis]} along "
                f"axis {axis}: set [data] channels to the axis of the statistics, or delete the "
                "attributes mean and std",
            )

    @property
    def is_known(self) -> bool:
        """Whether the moments are there, so that nothing need be computed."""
        return self._moments is not None

    @property
    def is_computed(self) -> bool:
        """Whether the moments are there and the data did not come with them."""
        return self.is_known and self.dataset.given_moments is None

    @property
    def moments(self) -> Moments:
        """Mean and deviation per channel."""
        if self._moments is None:
            self._moments = compute_statistics(self.dataset, self.axis).moments
        return self._moments

    def use(self, moments: Moments) -> None:
        """Take moments that were computed before, or by other ranks."""
        self._moments = moments

    def constant_channels(self) -> list[int]:
        """Return the channels in which all numbers are equal."""
        return [int(channel) for channel in np.flatnonzero(self.moments[1] == 0)]


@final
class Standardised(DatasetView):
    """Another data set, standardised per channel: (x - mean) / standard deviation.

    Parameters
    ----------
    dataset : Dataset
        The samples to standardise.
    training : TrainingStatistics
        Those of the training split. They are computed on first need of inputs, hence never on a
        stage that needs only labels. A constant channel is left at scale 1.
    """

    def __init__(self, dataset: Dataset, training: TrainingStatistics) -> None:
        super().__init__(dataset)
        self.training = training

    def __getstate__(self) -> dict[str, Any]:
        """Return what other processes need: the statistics, not the training split."""
        return {**self.__dict__, "_scale": self._scale, "training": None}

    @property
    def channel_axis(self) -> int:
        """The axis of a sample that holds the channels."""
        return self.training.axis

    @property
    def stored(self) -> Dataset:
        """The data set that is standardised."""
        return self._dataset

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        mean, deviation = self.training.moments
        deviation = np.where(deviation > 0, deviation, 1.0)
        view = [1] * (1 + len(self.shape))
        view[1 + self.channel_axis] = -1
        return torch.from_numpy(mean).view(view), torch.from_numpy(deviation).view(view)

    def inputs(self, indices: Any) -> Tensor:
        x = self._dataset.inputs(indices)
        mean, deviation = self._scale
        return (x - mean.to(x.dtype)).div_(deviation.to(x.real.dtype))

    def statistics(self) -> dict[str, Tensor]:
        """Return mean and standard deviation as they are applied: (channels, 1, ...), or with the
        channels at their axis."""
        mean, deviation = self._scale
        return {"mean": mean[0], "std": deviation[0]}

    def use_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Standardise by other statistics, as `statistics` returned them."""
        self.__dict__["_scale"] = statistics["mean"][None], statistics["std"][None]

    def to_unit_range(self, x: Tensor) -> Tensor:
        mean, deviation = (statistic.to(x) for statistic in self._scale)
        return self._dataset.to_unit_range(x * deviation + mean)


def standardise(splits: DatasetSplits, channels: Channels = "first") -> DatasetSplits:
    """Standardise all splits with the statistics of the training split, computed once.

    Raises
    ------
    ConfigError
        A sample has no such axis of channels.
    DataError
        The training split comes with statistics of another number of channels.
    """
    training = TrainingStatistics(splits.train, channel_axis(channels, splits.train.shape))
    return splits.map(lambda split: Standardised(split, training))


def unstandardised(split: Dataset) -> Dataset:
    """Return the data set that a `Standardised` reads, or the split itself."""
    return split.stored if isinstance(split, Standardised) else split


def find_standardised(split: Dataset) -> Standardised | None:
    """Return the `Standardised` whose inputs a split has; None where they are not standardised."""
    if isinstance(split, InputTargets):
        split = split.dataset
    return split if isinstance(split, Standardised) else None
