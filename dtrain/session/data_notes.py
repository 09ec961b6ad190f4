"""Check the values of the data at the start of a run, as far as that takes a moment.

Invariant: the checks read a split from its start until `CHECK_S` seconds have passed. All ranks
raise an error or none does, and all return the same notes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np

from dtrain.comm.agree import all_or_none, broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.data.channel_notes import channel_notes
from dtrain.data.label_notes import label_notes
from dtrain.data.statistics import find_standardised
from dtrain.data.value_check import all_targets_alike, check_finite, has_finite_statistics
from dtrain.objectives.messages import reads_samples
from dtrain.planning.plan import Plan

CHECK_S = 0.05
"""Seconds of each check at the start of a run: of values, of equal targets, and of labels."""


def data_notes(plan: Plan, comm: Comm) -> list[str]:
    """Return notes on the data. Collective over all ranks.

    Raises
    ------
    DataError
        On all ranks, if an input or a target is NaN or infinite, or a label out of range.
    """
    check_data_values(plan, comm, CHECK_S)
    notes: list[str] = broadcast_object(
        comm, lambda: [*_alike_notes(plan), *_label_notes(plan), *_channel_notes(plan)]
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
