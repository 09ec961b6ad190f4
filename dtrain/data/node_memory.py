"""Hold data in memory once per node, not once per rank.

Invariant: what is trained does not depend on whether data are held or read from disk, since a
source of the same rows takes the place of each one that is held.

::

    stored arrays     targets of all splits, then the samples of the training split, of the others
    first rank        holds, in this order, those that fit into half of the node's available memory
    ranks that read   get one memory together; each reads a share of the rows into it
    afterwards        every rank reads from this memory; the other arrays are read from disk

Ranks that read no samples (inner stages) hold targets alone and open no file of samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from dtrain.comm.agree import all_or_none
from dtrain.comm.communicator import Comm
from dtrain.data.array_source import ArraySource, MemorySource
from dtrain.data.conversion import Array
from dtrain.data.dataset import Dataset, DatasetView
from dtrain.data.memory_limits import available_bytes, fits_in_memory
from dtrain.data.source_dataset import SourceDataset
from dtrain.errors import DtrainError

MEMORY_FRACTION = 1 / 2
"""Part of a node's available memory that the data of all splits may take."""


SMALL_BYTES = 16 << 20
"""Arrays in memory up to this size stay on each rank."""


PIECE_BYTES = 4 << 20
"""Bytes that a rank reads at once while the memory of the node is filled."""


Place = Literal["node", "rank", "mapped", "disk"]
"""Where rows are: in memory once per node, in that of each rank, in a mapped file, or on disk."""


@final
@dataclass(frozen=True)
class StoredArray:
    """One source of a data set.

    Attributes
    ----------
    split : str
        Name of the split.
    dataset : SourceDataset
        The data set that reads from the source.
    position : int
        Index of the source among those of the data set.
    """

    split: str
    dataset: SourceDataset
    position: int

    @property
    def source(self) -> ArraySource:
        """The source as it is now."""
        return self.dataset.sources[self.position]

    @property
    def is_targets(self) -> bool:
        """Whether it holds targets."""
        return self.position == len(self.dataset.sources) - 1

    @property
    def content(self) -> str:
        """The content in a word: "inputs", "input 1" (the first further one), "targets"."""
        if self.is_targets:
            return "targets"
        return f"input {self.position}" if self.position else "inputs"

    @property
    def is_on_disk(self) -> bool:
        """Whether the rows are in no memory yet."""
        return not self.source.in_memory or self.source.is_lazy

    @property
    def place(self) -> Place:
        """Where the rows are now."""
        source = self.source
        if isinstance(source, MemorySource) and source.of_node:
            return "node"
        if source.is_mapped:
            return "mapped"
        return "rank" if source.in_memory else "disk"

    def replace(self, source: ArraySource) -> None:
        """Let the data set read from another source of the same rows."""
        sources = list(self.dataset.sources)
        sources[self.position] = source
        self.dataset.use_sources(sources)


def stored_arrays(splits: Mapping[str, Dataset]) -> list[StoredArray]:
    """Return the sources of all splits, those first that are held first.

    Items that the code of a user makes one by one are left out.
    """
    arrays: dict[tuple[int, int], StoredArray] = {}
    for split, view in splits.items():
        dataset = view
        while isinstance(dataset, DatasetView):
            dataset = dataset.base
        if isinstance(dataset, SourceDataset):
            for position, source in enumerate(dataset.sources):
                if source.by_item:
                    continue
                arrays.setdefault((id(dataset), position), StoredArray(split, dataset, position))
    return sorted(arrays.values(), key=lambda array: not array.is_targets)


def choose_held(arrays: Sequence[StoredArray], available: int, owned: bool) -> list[StoredArray]:
    """Return the arrays to hold once per node.

    Parameters
    ----------
    arrays : sequence of StoredArray
        All of them, in the order of their importance.
    available : int
        Bytes that every rank of the node may still use.
    owned : bool
        Whether nothing but the data sets refers to arrays that are in memory already, so that the
        copy of a rank is freed when that of the node takes its place.
    """
    left, held = int(MEMORY_FRACTION * available), []
    for array in arrays:
        if _is_candidate(array, owned) and array.source.nbytes <= left:
            left -= array.source.nbytes
            held.append(array)
    return held


def _is_candidate(array: StoredArray, owned: bool) -> bool:
    source = array.source
    if source.is_mapped or source.by_item or source.repeats or array.place == "node":
        return False
    if not source.in_memory:
        return True
    # An array that repeats its rows takes less memory than it says.
    repeats = isinstance(source, MemorySource) and 0 in source.array.strides
    return source.nbytes > SMALL_BYTES and (source.is_lazy or owned) and not repeats


def hold_on_node(
    splits: Mapping[str, Dataset],
    comm: Comm,
    *,
    reads_inputs: bool,
    owned: bool,
    used: Sequence[str] | None = None,
) -> bool:
    """Hold the arrays of the splits once per node as far as they fit; the others are read from
    disk. Collective over `comm`. Returns whether there were arrays to hold, on any rank.

    Parameters
    ----------
    splits : mapping of str to Dataset
        The splits by name.
    reads_inputs : bool
        Whether this rank reads samples.
    owned : bool
        As in `choose_held`.
    used : sequence of str, optional
        The splits that are read often; default: all of them. No other one is held.

    Raises
    ------
    DtrainError
        On all ranks, if rows cannot be read.
    """
    arrays = stored_arrays(splits)
    candidates = [
        array
        for array in arrays
        if _is_candidate(array, owned) and (used is None or array.split in used)
    ]
    facts = [[a.split, a.content, list(a.source.shape), str(a.source.dtype)] for a in candidates]
    rows = comm.allgather_object([available_bytes(), facts])
    is_needed = any(candidates_of_rank for _, candidates_of_rank in rows)
    if is_needed:
        node_rows = [rows[rank] for rank in comm.topology.node_ranks]
        if any(other != facts for _, other in node_rows):
            candidates = []  # the ranks have different data: an error soon
        held = choose_held(candidates, min(available for available, _ in node_rows), owned)
        comm.raise_together(_hold_arrays(held, comm, reads_inputs))
    for dataset in {id(array.dataset): array.dataset for array in arrays}.values():
        dataset.keep_on_disk()
    return is_needed


def _hold_arrays(held: Sequence[StoredArray], comm: Comm, reads_inputs: bool) -> DtrainError | None:
    """Hold these arrays; return the error of a rank of this node, if there is one.

    Collective over `comm`. Targets are first, so ranks that read no samples wait for nobody.
    """
    node = comm.split_by_node()
    readers = node.split(int(reads_inputs))
    try:
        for array in held:
            if array.is_targets:
                _hold(array, node)
            elif reads_inputs:
                _hold(array, readers)
    except DtrainError as error:
        return error
    finally:
        readers.close()
        node.close()
    return None


def _hold(array: StoredArray, ranks: Comm) -> None:
    """Let ranks of a node read from one copy of an array. Collective over `ranks`.

    The copies that ranks have in memory must be equal; otherwise they are left to them.
    """
    source = array.source
    on_disk = array.is_on_disk
    if not on_disk and (ranks.size == 1 or len(set(ranks.allgather_object(_hash(source)))) > 1):
        return
    memory = ranks.allocate_shared(source.nbytes)
    if memory is not None:
        rows: Array = memory.view(source.dtype).reshape(source.shape)
        all_or_none(ranks, lambda: _fill(rows, source, ranks.rank, ranks.size))
        array.replace(MemorySource(rows, source.location, of_node=True))
    elif on_disk:
        all_or_none(ranks, lambda: _load_copy(array, ranks.size))
    source.close()


def _load_copy(array: StoredArray, ranks: int) -> None:
    """Read all rows into memory of this rank's own if a copy of each rank fits."""
    source = array.source
    if fits_in_memory(source.nbytes * ranks):
        array.replace(MemorySource(source.read_range(0, len(source)), source.location))


def _fill(rows: Array, source: ArraySource, rank: int, ranks: int) -> None:
    """Read a rank's share of the rows into place, in whole chunks."""
    if source.is_lazy:  # it is read as a whole
        rank, ranks = (0, 1) if rank == 0 else (1, 1)
    chunk = source.chunk_rows or 1
    chunks = -(-len(source) // chunk)
    first, last = chunks * rank // ranks, chunks * (rank + 1) // ranks
    for start, stop in _pieces(first * chunk, min(last * chunk, len(source)), source):
        source.read_into(rows[start:stop], start)


def _pieces(start: int, stop: int, source: ArraySource) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, of whole chunks and of some megabytes."""
    chunk = source.chunk_rows or 1
    step = chunk * max(1, PIECE_BYTES // max(1, chunk * source.row_bytes))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _hash(source: ArraySource) -> str:
    """Return a hash of all rows."""
    digest = hashlib.blake2b(digest_size=16)
    for start, stop in _pieces(0, len(source), source):
        digest.update(np.ascontiguousarray(source.read_range(start, stop)).view(np.uint8).data)
    return digest.hexdigest()
