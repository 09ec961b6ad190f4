"""Mean and deviation per channel of a split, in one pass over its samples.

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.data.conversion import Array, to_summable
from dtrain.data.dataset import (
    SAMPLES_PER_READ,
    Moments,
)
from dtrain.data.statistics.exact_sums import exact_sums, has_exact_sums
from dtrain.errors import ConfigError

Channels = Literal["first", "last"] | int
"""The axis of a sample along which statistics are kept, as `[data] channels` has it."""


EXACT_PIECE_BYTES = 2**22
"""Bytes of a piece of small integers, unless one sample is larger: it is summed while it is in the
cache."""


PIECE_BYTES = 2**25
"""Bytes of a piece of other numbers, unless one sample is larger."""


MAX_PIECE_BYTES = 2**26
"""Bytes up to which a piece of other numbers has `SAMPLES_PER_READ` samples."""


MIN_READERS = 2
"""Threads that read and add up small integers from files: one waits for the disk."""


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
        if self.is_exact and getattr(self._source, "reads_in_threads", False):
            yield from self._read_in_threads(pieces, max(MIN_READERS, threads))
            return
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

    def _read_in_threads(self, pieces: Sequence[range], threads: int) -> Iterator[PieceSums]:
        """Yield the sums of pieces, each of which a thread reads and adds up."""

        def read_and_sum(piece: range) -> PieceSums:
            return self._sum(self._source.read_stored(piece), piece.start)

        running = deque[Future[PieceSums]]()
        with ThreadPoolExecutor(threads, "dtrain-statistics") as pool:
            for piece in pieces:
                if len(running) == 2 * threads:
                    yield running.popleft().result()
                running.append(pool.submit(read_and_sum, piece))
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
