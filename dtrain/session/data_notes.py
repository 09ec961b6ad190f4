"""Check the values of the data at the start of a run, as far as that takes a moment.

Invariant: the checks read a split from its start until `CHECK_S` seconds have passed. All ranks
raise an error or none does, and all return the same notes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from dtrain.comm.agree import all_or_none, broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.data.augment import UserAugment, build_augment
from dtrain.data.channel_notes import channel_notes
from dtrain.data.dataset import Dataset
from dtrain.data.label_notes import label_notes
from dtrain.data.memory_limits import available_bytes
from dtrain.data.node_memory import SMALL_BYTES, stored_arrays
from dtrain.data.repeatability import check_repeatable
from dtrain.data.shuffle_windows import StoredPieces, group_rows
from dtrain.data.statistics import find_standardised
from dtrain.data.value_check import all_targets_alike, check_finite, has_finite_statistics
from dtrain.errors import DataError
from dtrain.objectives.messages import reads_samples
from dtrain.planning.data_memory import node_warnings
from dtrain.planning.plan import Plan

CHECK_S = 0.05
"""Seconds of each check at the start of a run: of values, of equal targets, and of labels."""


AUGMENTED_SAMPLES = 4
"""Samples for which a user's augmentation is called twice at the start of a run."""


NOTED_RATIO = 2.0
"""A full shuffle is noted if it reads this many times the bytes that it uses."""


def data_notes(plan: Plan, comm: Comm) -> list[str]:
    """Return notes on the data. Collective over all ranks.

    Raises
    ------
    DataError
        On all ranks, if an input or a target is NaN or infinite, or a label is out of range.
    ConfigError
        On all ranks, if `[data] augment` uses other random numbers than those that it is given.
    """
    check_data_values(plan, comm, CHECK_S)
    all_or_none(comm, lambda: _check_augment(plan, comm.rank))
    notes: list[str] = broadcast_object(comm, lambda: list(_all_notes(plan)))
    return notes


def _all_notes(plan: Plan) -> Iterator[str]:
    yield from _alike_notes(plan)
    yield from _label_notes(plan)
    yield from _channel_notes(plan)
    yield from shuffle_notes(plan.data.train, plan.run.data.shuffle)


def shuffle_notes(train: Dataset, shuffle: str) -> Iterator[str]:
    """Yield a note where a full shuffle reads much more from a disk than it uses."""
    stored = train.stored_pieces
    if shuffle != "full" or stored is None or not train.slow:
        return
    read = full_shuffle_bytes(stored, train.size)
    if read < NOTED_RATIO * stored.row_bytes:
        return
    pieces = "compressed pieces" if stored.compressed else "pieces"
    yield (
        f'[data] shuffle = "full" reads about {_size_text(read)} for each training sample of '
        f"{_size_text(stored.row_bytes)}, because samples are stored in {pieces} of "
        f'{stored.chunk_rows} ({_size_text(stored.piece_bytes)}): set shuffle = "chunks", which '
        "reads each piece about once an epoch, or store smaller pieces by 'dtrain data rechunk'"
    )


def full_shuffle_bytes(stored: StoredPieces, size: int) -> float:
    """Return the expected bytes that are read per sample if groups of random samples are read."""
    pieces, rows = size / (stored.chunk_rows or 1), min(size, group_rows(stored.row_bytes))
    read_pieces = pieces * -math.expm1(-rows / pieces)
    return max(1.0, read_pieces * (stored.chunk_rows or 1) / rows) * stored.row_bytes


def _size_text(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size >= 1e5 else f"{size / 1e3:.3g} kB"


def memory_notes(plan: Plan, comm: Comm) -> list[str]:
    """Return notes on nodes that hold data and whose ranks need more memory than they have left.

    Collective over all ranks.
    """
    arrays = stored_arrays(plan.data.by_name())
    is_held = any(a.place == "node" and a.source.nbytes > SMALL_BYTES for a in arrays)
    rows = comm.allgather_object([is_held, available_bytes()])
    if not any(is_held for is_held, _ in rows):
        return []
    available = [size for _, size in rows]
    notes: list[str] = broadcast_object(
        comm, lambda: node_warnings(plan, comm.topology.nodes, available)
    )
    return notes


def _channel_notes(plan: Plan) -> Iterator[str]:
    """Yield notes on the channels by which inputs are standardised, where they are."""
    standardised = find_standardised(plan.data.train)
    if standardised is not None:
        yield from channel_notes(standardised.training)


def _label_notes(plan: Plan) -> Iterator[str]:
    """Yield the notes on class labels."""
    sampler = getattr(plan.run.data, "sampler", "uniform")
    deadline = time.monotonic() + CHECK_S
    yield from label_notes(plan.data.by_name(), plan.layout.task, sampler, deadline)


def check_data_values(plan: Plan, comm: Comm, limit_s: float) -> None:
    """Refuse NaN and infinite values. Collective over all ranks.

    The ranks that read inputs share the samples. A mean that is not finite, by which inputs are
    standardised, lifts the time limit.

    Raises
    ------
    DataError
        On all ranks; it names split, sample and channel.
    """
    all_or_none(comm, lambda: _check_own_part(plan, comm.rank, limit_s))


def _check_own_part(plan: Plan, rank: int, limit_s: float) -> None:
    replica, stage = plan.layout.mesh.coords(rank)
    if not _reads_inputs(plan, stage):
        return
    deadline = time.monotonic() + limit_s
    for name, split in reversed(plan.data.by_name().items()):  # training samples last
        rows = np.arange(replica, split.size, plan.layout.mesh.replicas)
        is_known_bad = name == "train" and not has_finite_statistics(split)
        check_finite(split, name, rows, math.inf if is_known_bad else deadline)


def check_data_repeatable(plan: Plan, comm: Comm) -> None:
    """Refuse data that are no function of the index. Collective over all ranks.

    Raises
    ------
    DataError
        On all ranks; it names split and sample.
    """
    reads_inputs = _reads_inputs(plan, plan.layout.mesh.coords(comm.rank)[1])

    def check() -> None:
        deadline = time.monotonic() + CHECK_S
        for name, split in plan.data.by_name().items():
            check_repeatable(split, name, reads_inputs, deadline)

    all_or_none(comm, check)


def _check_augment(plan: Plan, rank: int) -> None:
    """Refuse a user's augmentation that is no function of what it is given."""
    reads_inputs = _reads_inputs(plan, plan.layout.mesh.coords(rank)[1])
    train, run = plan.data.train, plan.run
    augment = build_augment(run.data.augment, run.settings.seed, run.folder)
    if reads_inputs and isinstance(augment, UserAugment):
        rows = np.unique(np.linspace(0, train.size - 1, AUGMENTED_SAMPLES).astype(np.int64))
        augment.check_repeatable(train.inputs(rows), train.source_indices(rows))


def same_draws(plan: Plan, comm: Comm) -> dict[str, str]:
    """Verify that all ranks have the same sampler and the same weights of samples.

    Collective over all ranks. Returns what identifies both in a later start, without those that a
    run does not have.

    Raises
    ------
    DataError
        On all ranks, if a weight is not legal, or differs between ranks.
    """
    draws = all_or_none(comm, lambda: plan.draws)
    weights = {
        "sampler": None if draws is None else draws.weights,
        "sample weights": plan.data.train.sample_weights,
    }
    hashes = {
        name: blake2b(values.tobytes(), digest_size=8).hexdigest()
        for name, values in weights.items()
        if values is not None
    }
    others = comm.allgather_object(hashes) if hashes else []
    for name, own in hashes.items():
        if any(other[name] != own for other in others):
            raise DataError(
                "data.ranks-differ",
                f"the ranks have different weights of samples ({name}): make them the same in "
                "every process (seed their random numbers)",
                on_all_ranks=True,
            )
    return hashes


def _reads_inputs(plan: Plan, stage: int) -> bool:
    """Return whether a stage reads inputs in training or in prediction."""
    objective, layout = plan.layout.objective, plan.layout
    specs = [layout.block_specs[index] for index in layout.blocks_of_stage(stage)]
    return any(
        reads_samples(objective, spec, "train") or reads_samples(objective, spec, "predict")
        for spec in specs
    )


def _alike_notes(plan: Plan) -> Iterator[str]:
    """Yield a note for each split whose targets are all alike."""
    task = plan.layout.task
    deadline = time.monotonic() + CHECK_S
    for name, split in plan.data.by_name().items():
        value = None if task.target == "input" else all_targets_alike(split, deadline)
        if value is None:
            continue
        noun = "labels" if task.has_classes else "targets"
        effect = "any model that returns this constant has a loss near 0"
        if name != "train":
            effect = "metrics on it do not measure learning"
            if task.counts_samples:
                effect = "a constant prediction has an accuracy of 0 or 100 % on it"
        yield (
            f"all {split.size:,} {noun} of the {name} split are {value:g}: {effect}; shuffle the "
            "samples before they are split, or check the column of the targets"
        )
