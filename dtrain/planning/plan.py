"""Turn a run file into a proven plan, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.config.run import RunConfig
from dtrain.data import augment as augments
from dtrain.data import load_data
from dtrain.data.dataset import DatasetSplits
from dtrain.data.sampler import BatchSplitter, updates_per_epoch
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.objectives.block_spec import BlockSpec
from dtrain.planning.layout import Layout, make_layout
from dtrain.schedules.segments import TrainingLength
from dtrain.schedules.verify import ScheduleReport

PROOF_UPDATES = 8
"""Updates at an epoch's start that the proof and the drawing look at."""


@dataclass(frozen=True)
class Plan:
    """A run that fits its data and its ranks; the same on all of them.

    Attributes
    ----------
    run : Run
        Resolved: the numbers of blocks and stages are settled.
    blocks_assumed : bool
        Whether the number of blocks was taken from the stages.
    proof : Report
        What the schedule's proof saw.
    """

    run: RunConfig
    data: DatasetSplits
    layout: Layout
    training_length: TrainingLength
    batch_splitter: BatchSplitter
    proof: ScheduleReport
    blocks_assumed: bool


def make_plan(run: RunConfig, ranks: int) -> Plan:
    """Return the plan of `run` on a number of ranks, its order proven free of deadlock.

    Raises
    ------
    DtrainError
        Data, model, mesh, partition or schedule do not fit each other.
    """
    samples = load_data(
        run.dataset.name, run.dataset.fields, run.folder, normalise=run.data.normalise
    )
    shape, classes = samples.train.shape, samples.train.classes
    augment = augments.build_augment(run.data.augment, run.settings.seed)
    if augment is not None:
        augment.check_shape(shape)
    about = BlockSpec.from_data(
        shape, classes, samples.train.size, samples.train.value_range is not None
    )
    seen = run.make_objective().model_input_shape(shape, classes)
    model = load_model(run.model.name, run.model.fields, run.folder, seen, classes)
    layout = make_layout(run, model, about, ranks)
    top, coupling = run.settings, layout.coupling_layers
    calendar = TrainingLength.from_settings(
        updates_per_epoch(samples.train.size, top.batch_size),
        top.epochs,
        top.updates,
        top.segment,
        run.checkpoint.every,
    )
    shares = BatchSplitter(
        top.batch_size, layout.mesh.replicas, top.micro_batches, 1 + bool(coupling)
    )
    last = (samples.train.size - 1) % top.batch_size + 1
    if last < shares.min_rows:
        raise ConfigError(
            "todo.key",
            f"the last update of an epoch has 1 of {samples.train.size} samples, too few for the "
            f"batch statistics of layer '{coupling[0]}': set batch-size = {top.batch_size + 1} or "
            f"{max(top.batch_size - 1, 2)}",
        )
    fixed = run.resolve(len(layout.block_layouts), layout.mesh.stages)
    proof = layout.prove(_proof_sizes(shares, samples.train.size, calendar.updates_per_epoch))
    assumed = run.partition.blocks is None and run.partition.cuts is None
    return Plan(fixed, samples, layout, calendar, shares, proof, assumed)


def _proof_sizes(batch_splitter: BatchSplitter, size: int, updates: int) -> list[list[int]]:
    """Return ``[replica][update]`` micro-batches of an epoch's first updates and its last."""
    first = batch_splitter.count_micro_batches(size, 0, min(updates, PROOF_UPDATES))
    last = batch_splitter.count_micro_batches(size, max(updates - 1, 0), updates)
    return [head + tail for head, tail in zip(first, last, strict=True)]
