"""Evaluate loss and accuracy of a model on a split, during a run or after it.

Invariant: the run alone decides how a split is cut into micro-batches, and losses are added in the
order of the samples. So an evaluation of a checkpoint on any ranks gives the numbers of the run.

::

    split            | replica 0 of the run | replica 1     |
    micro-batches    | 0     | 1     | 2    | 3     | 4     |     cut as the run cuts its updates
    1 x 3 ranks      |   all of them, block after block     |
    2 x 1 ranks      |   0 1 2              |   3 4         |     whatever the run's replicas were
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from dtrain.build import (
    RankJob,
    build_rank,
    check_same_data,
    check_same_layout,
    hold_data,
    make_plan_together,
    set_threads,
)
from dtrain.checkpoint.manifest import Manifest
from dtrain.checkpoint.newest_checkpoint import load_newest, newest_checkpoint
from dtrain.checkpoint.store import load_blocks
from dtrain.comm.agree import all_or_none
from dtrain.comm.communicator import Comm
from dtrain.config.parse import read_resolved_run
from dtrain.config.run import RunConfig
from dtrain.data.reading.loader import Loader
from dtrain.data.sampler import BatchSplitter, Indices, even_ranges, shared_ranges
from dtrain.data.statistics.shared_statistics import use_kept_statistics
from dtrain.data.statistics.standardise import Standardised
from dtrain.errors import ConfigError
from dtrain.monitoring.run_totals import RunTotals, evaluation_metrics
from dtrain.planning.plan import Plan

EvalWeights = Mapping[int, Mapping[str, Tensor]]
"""Parameters and buffers that are evaluated, by block and name."""


SplitName = Literal["train", "test", "validation"]


OVERRIDABLE_KEYS = ("device", "threads", "task.metrics")
"""Keys that an evaluation may change, beside those of [data] and the `prediction_fields` of the
objective: none of them changes the weights."""


def evaluation_weights(job: RankJob) -> EvalWeights:
    """Return the evaluation weights of the syncs, by block. Collective over all ranks.

    Its messages are not counted as traffic.
    """
    with job.groups.control.without_counting():
        return {index: sync.evaluation_weights() for index, sync in job.engine.syncs.items()}


def evaluate_weights(
    job: RankJob, eval_weights: EvalWeights, loader: Loader, batch_splitter: BatchSplitter
) -> dict[str, Any]:
    """Return loss and accuracies over all samples of a loader. Collective over all ranks.

    Its messages are not counted as traffic. The keys are those of a summary.

    Parameters
    ----------
    batch_splitter : BatchSplitter
        How the run cuts an update; its replicas may differ from those of the job.
    """
    engine, control, position = job.engine, job.groups.control, job.position
    batches = evaluation_batches(loader.dataset.size, batch_splitter)
    if loader.dataset.graph is not None:  # a node needs the others
        batches = [np.arange(loader.dataset.size)]
    shares = position.mesh.shares or (1,) * position.mesh.replicas
    own_range = shared_ranges(len(batches), shares)[position.replica]
    with control.without_counting(), ExitStack() as swapped:
        for index, block in engine.blocks.items():
            swapped.enter_context(block.swap_tensors(eval_weights[index]))
        sums_per_batch = job.evaluator.evaluate(loader, batches[own_range.start : own_range.stop])
    own_records = [
        {"micro": micro, "stage": position.stage, **asdict(sums)}
        for micro, sums in zip(own_range, sums_per_batch, strict=True)
    ]
    records = [record for rank in control.allgather_object(own_records) for record in rank]
    records.sort(key=lambda record: int(record["micro"]))
    return evaluation_metrics(
        records,
        len(engine.block_specs),
        engine.objective.predicts_by_vote,
        engine.engine_spec.task,
    )


def evaluation_batches(size: int, batch_splitter: BatchSplitter) -> list[Indices]:
    """Return the micro-batches of a split: the parts of the run's replicas, cut as updates are."""
    rows = batch_splitter.largest_micro_batch
    return [
        np.arange(start, min(start + rows, part.stop))
        for part in even_ranges(size, batch_splitter.replicas)
        for start in range(part.start, part.stop, rows)
    ]


def evaluate_run(
    folder: Path,
    comm: Comm,
    split: SplitName = "test",
    overrides: Sequence[str] = (),
    run: RunConfig | None = None,
    best: bool = False,
    ema: bool = False,
) -> dict[str, Any]:
    """Evaluate the newest complete checkpoint of a run. Collective over `comm`.

    It is read-only and takes no lock, so the run may still be training.

    Parameters
    ----------
    folder : Path
        The run folder.
    split : str
        "test", "train" or "validation"; samples are read in order, without augmentation.
    overrides : sequence of str
        ``KEY=VALUE``: keys of [data], `device`, `threads`, `task.metrics`, or fields of the
        objective that change predictions alone.
    run : RunConfig, optional
        In place of the folder's `run.toml`, where that names objects that cannot be imported.
    best : bool
        Evaluate the weights that `[checkpoint] best` has kept.
    ema : bool
        Evaluate the averaged weights of `[ema]`.

    Raises
    ------
    ConfigError
        There is no run, no checkpoint, or a key may not be set; on all ranks, as all errors.
    CheckpointError
        The checkpoint is damaged.
    DataError
        The data are missing or do not fit the model.
    """
    job, manifest = load_checkpoint(folder, comm, overrides, run, best, ema, (split,))
    plan = job.plan
    totals = RunTotals.from_state(manifest.state)
    loader = _loader(job, split)
    eval_weights = {index: block.tensors() for index, block in job.engine.blocks.items()}
    batch_splitter = replace(
        plan.batch_splitter, replicas=_replicas(totals), shares=_shares(manifest)
    )
    metrics = evaluate_weights(job, eval_weights, loader, batch_splitter)
    place = {"folder": str(folder.resolve()), "checkpoint": manifest.folder.name}
    result = {"split": split, "samples": loader.dataset.size}
    return place | _describe_run(plan, totals) | result | _describe_metrics(plan, metrics)


def load_checkpoint(
    folder: Path,
    comm: Comm,
    overrides: Sequence[str],
    run: RunConfig | None,
    best: bool = False,
    ema: bool = False,
    splits: Sequence[str] = (),
) -> tuple[RankJob, Manifest]:
    """Return this rank with the newest complete checkpoint of a run. Collective over `comm`.

    Parameters and errors are those of `evaluate_run`. Data of `splits` are held in memory.
    """
    config = all_or_none(comm, lambda: _read_run(folder, overrides, run))
    set_threads(config, comm)
    fitted = all_or_none(comm, lambda: _fit_stages(config, comm.size))
    plan = make_plan_together(fitted, comm)
    check_same_layout(plan, comm)
    hold_data(plan, comm, splits)
    use_kept_statistics(plan.data, comm, [folder])
    check_same_data(plan, comm)
    job = build_rank(plan, comm)

    def load(manifest: Manifest) -> Manifest:
        load_blocks(manifest, job.engine.blocks, "model")
        if ema:
            _load_averages(manifest, job)
        _use_saved_statistics(manifest, job)
        return manifest

    manifest = load_newest(folder, load, job.groups.control, best)
    return job, manifest


def _loader(job: RankJob, split: SplitName) -> Loader:
    """Return the loader of a split, without augmentation."""
    splits = job.plan.data.by_name()
    if split not in splits:
        raise ConfigError(
            "evaluate.no-validation",
            "--split validation, but the run has no validation split: choose test or train",
            on_all_ranks=True,
        )
    return Loader(splits[split], job.plan.layout.dtype, workers=job.workers)


def _load_averages(manifest: Manifest, job: RankJob) -> None:
    """Give the blocks of this rank the averaged weights of a checkpoint."""
    manifest.check_ema()
    averages = {
        f"ema/{name}": tensor
        for block in job.engine.blocks.values()
        for name, tensor in block.tensors().items()
        if f"ema/{name}" in manifest.files
    }
    for key, tensor in manifest.load_like(averages).items():
        averages[key].copy_(tensor)


def _describe_run(plan: Plan, totals: RunTotals) -> dict[str, Any]:
    """Return how long a run has trained, and how its model predicts."""
    votes = plan.layout.objective.predicts_by_vote and plan.layout.task.has_classes
    return {
        "updates": totals.update,
        "epochs": totals.update // plan.training_length.updates_per_epoch,
        "objective": plan.run.objective.name,
        "prediction": "vote" if votes else "last block",
    }


def _describe_metrics(plan: Plan, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "loss": metrics["test_loss"],
        "accuracy": metrics["test_accuracy"],
        "accuracy_of": "samples" if plan.layout.task.counts_samples else "positions",
        "accuracy_vote": metrics["test_accuracy_vote"],
        "accuracy_per_block": metrics["accuracy_per_block"],
        "metrics": metrics["metrics"],
        "ranks": plan.layout.mesh.ranks,
        "stages": plan.layout.mesh.stages,
    }


def _use_saved_statistics(manifest: Manifest, job: RankJob) -> None:
    """Standardise inputs as the training did, whatever training split is there now."""
    statistics = manifest.load_prefix("statistics/") if job.evaluator.needs_samples else {}
    for split in job.plan.data.by_name().values():
        if statistics and isinstance(split, Standardised):
            split.use_statistics(statistics)


def _read_run(folder: Path, overrides: Sequence[str], run: RunConfig | None) -> RunConfig:
    """Return the resolved run of a folder, with the overrides that an evaluation may have."""
    run_table = newest_checkpoint(folder).run_table
    if run is not None and not overrides:
        return run.with_checkpoint_blocks(run_table)
    trained = read_resolved_run(folder / "run.toml")
    for override in overrides:
        _check_override(override, trained)
    return read_resolved_run(folder / "run.toml", overrides) if overrides else trained


def _check_override(override: str, run: RunConfig) -> None:
    """Reject a key that changes the weights."""
    fields = {field.replace("_", "-") for field in run.objective.instance.prediction_fields}
    keys = (*OVERRIDABLE_KEYS, *sorted(f"objective.{field}" for field in fields))
    key = override.partition("=")[0].strip()
    if not key.startswith("data.") and key not in keys:
        raise ConfigError(
            "evaluate.override",
            f"--set {override} would change the trained model: set only data.*, "
            f"{' or '.join(keys)}",
        )


def _fit_stages(run: RunConfig, ranks: int) -> RunConfig:
    """Return the run on as many stages as ranks and blocks allow; the rest are replicas."""
    blocks, partition = run.partition.chosen_blocks or 1, replace(run.partition, places=None)
    stages = max(n for n in range(1, min(ranks, blocks) + 1) if ranks % n == 0)
    mesh = replace(run.mesh, stages=stages, shares=None)
    return replace(run, mesh=mesh, partition=partition)


def _shares(manifest: Manifest) -> tuple[int, ...]:
    """Return the shares of the replicas that trained the checkpoint."""
    return tuple(manifest.run_table.get("mesh", {}).get("shares", ()))


def _replicas(totals: RunTotals) -> int:
    """Return the number of replicas that trained the checkpoint last."""
    return max(1, len(totals.peak_bytes) // max(1, len(totals.busy_s)))
