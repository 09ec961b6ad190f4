"""Chunks and windows of `shuffle = "chunks"` that fit the buffers of reading ahead.

Invariant: both depend only on how the samples are stored, never on the memory of a machine, so the
order of an epoch is the same everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

GROUP_BYTES = 2**26
"""Most bytes of stored samples that are read at once, as one group."""


CHUNK, WINDOW = 256, 16
"""Samples per chunk and chunks per window where that many fit into a group."""


class StoredPieces(NamedTuple):
    """How the samples of a split are stored in files.

    Attributes
    ----------
    row_bytes : int
        Bytes of one stored sample.
    chunk_rows : int or None
        Samples of a stored piece that is read as a whole; None where each is read by itself.
    compressed : bool
        Whether a stored piece is decoded for each read of one of its samples.
    """

    row_bytes: int
    chunk_rows: int | None = None
    compressed: bool = False

    @property
    def piece_bytes(self) -> int:
        """Bytes of a stored piece."""
        return (self.chunk_rows or 1) * self.row_bytes


def group_rows(row_bytes: int) -> int:
    """Return the most rows of a group, at least 1."""
    return max(1, GROUP_BYTES // max(1, row_bytes))


def shuffle_window(stored: StoredPieces | None) -> tuple[int, int]:
    """Return the samples per chunk and the chunks per window of `shuffle = "chunks"`.

    A window is read as one group, so that each of its stored pieces is read once. A window of 16
    chunks of 256 samples is the rule, because small chunks shuffle better and 4,096 samples
    decorrelate neighbours. If it exceeds `GROUP_BYTES`, both shrink: still 16 chunks, so that a
    window mixes distant parts of the file. If the samples are stored in pieces of several, a chunk
    is a whole number of pieces, since a piece in two chunks would be read twice; then there may be
    fewer than 16 or more. A piece larger than a group is not respected: a window must fit.

    Parameters
    ----------
    stored : StoredPieces or None
        None: the samples are in memory, where every order is read equally fast.
    """
    if stored is None or CHUNK * WINDOW * stored.row_bytes <= GROUP_BYTES:
        return CHUNK, WINDOW
    rows = group_rows(stored.row_bytes)
    piece = stored.chunk_rows or 1
    if piece > rows:
        piece = 1
    chunk = max(piece, rows // WINDOW // piece * piece)
    return chunk, max(1, rows // chunk)
