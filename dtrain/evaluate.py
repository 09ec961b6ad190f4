"""Exams: loss and accuracy of a model on a split, of a run that goes on or of one that has ended.

Invariant: a split is cut into micro-batches by the run alone, and losses are added in the order of
its samples; so whoever examines a checkpoint, on whatever ranks, finds the numbers of the run.

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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from dtrain.build import RankJob, build_rank, check_same_data, set_threads
from dtrain.checkpoint.manifest import Manifest
from dtrain.checkpoint.manifest import read_manifest as read_manifest
from dtrain.checkpoint.resume import CHECKPOINT_FOLDER, newest_checkpoint
from dtrain.comm.agree import all_or_none
from dtrain.comm.communicator import Comm
from dtrain.config.parse import read_run
from dtrain.config.run import RunConfig
from dtrain.data.loader import Loader
from dtrain.data.sampler import BatchSplitter, Indices, even_ranges
from dtrain.errors import ConfigError, DtrainError
from dtrain.monitoring.run_totals import RunTotals, evaluation_metrics
from dtrain.planning.plan import make_plan
from dtrain.schema import dump_toml

EvalWeights = Mapping[int, Mapping[str, Tensor]]


SplitName = Literal["train", "test"]


RUN_FILE_HEADER = "# resolved from {}, where relative paths and imports start"
"""The first line of the `run.toml` of a run folder."""


OVERRIDABLE_KEYS = ("device", "threads")
"""What may be set anew beside keys of [data]: nothing that was trained."""


MAX_RELOADS = 20
"""Checkpoints that may be replaced while they are read, one after the other."""


def evaluation_weights(job: RankJob) -> EvalWeights:
    """Return what the syncs show, by block. Collective; not counted as traffic."""
    with job.groups.control.without_counting():
        return {index: sync.evaluation_weights() for index, sync in job.engine.syncs.items()}


def evaluate_weights(
    job: RankJob, eval_weights: EvalWeights, loader: Loader, batch_splitter: BatchSplitter
) -> dict[str, Any]:
    """Return loss and accuracies of what `views` show, over all that `reader` has.

    Collective; not counted as traffic. The keys are those of a summary.

    Parameters
    ----------
    shares : Shares
        How the run cuts an update; its replicas need not be those of the job.
    """
    engine, control, seat = job.engine, job.groups.control, job.position
    micros = evaluation_batches(loader.dataset.size, batch_splitter)
    own = even_ranges(len(micros), seat.mesh.replicas)[seat.replica]
    with control.without_counting(), ExitStack() as shown:
        for index, block in engine.blocks.items():
            shown.enter_context(block.swap_tensors(eval_weights[index]))
        tallies = job.evaluator.evaluate(loader, micros[own.start : own.stop])
    rows = [
        {"micro": micro, "stage": seat.stage, **asdict(tally)}
        for micro, tally in zip(own, tallies, strict=True)
    ]
    told = [row for rank in control.allgather_object(rows) for row in rank]
    told.sort(key=lambda row: int(row["micro"]))
    return evaluation_metrics(told, len(engine.block_specs), engine.objective.predicts_by_vote)


def evaluation_batches(size: int, batch_splitter: BatchSplitter) -> list[Indices]:
    """Return the micro-batches of a split: the parts of the run's replicas, cut as updates are."""
    rows = batch_splitter.largest_micro_batch
    return [
        np.arange(start, min(start + rows, part.stop))
        for part in even_ranges(size, batch_splitter.replicas)
        for start in range(part.start, part.stop, rows)
    ]


def run_file_text(run: RunConfig) -> str:
    """Return the text of `run.toml` in a run folder: where the run comes from, and all its keys."""
    return f"{RUN_FILE_HEADER.format(run.path)}\n{dump_toml(run.to_table())}"


def evaluate_run(
    folder: Path, comm: Comm, split: SplitName = "test", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what the newest complete checkpoint of a run scores, on the ranks of `comm`.

    Collective. Nothing is written, and a run that goes on is left alone.

    Parameters
    ----------
    split : str
        "test" or "train"; samples are taken in order and as they are.
    overrides : sequence of str
        ``KEY=VALUE``, of [data] and of where to compute.

    Raises
    ------
    DtrainError
        On all ranks alike: no run, no checkpoint, a damaged one, data that do not fit.
    """
    run = all_or_none(comm, lambda: _read_run(folder, overrides))
    set_threads(run, comm)
    agreed = all_or_none(comm, lambda: make_plan(_fit_stages(run, comm.size), comm.size))
    check_same_data(agreed, comm)
    job = build_rank(agreed, comm)
    manifest = _load_checkpoint(job, folder)
    totals = RunTotals.from_state(manifest.state)
    shares = replace(agreed.batch_splitter, replicas=_replicas(totals))
    reader = job.test_loader if split == "test" else Loader(agreed.data.train, agreed.layout.dtype)
    shown = {index: block.tensors() for index, block in job.engine.blocks.items()}
    found = evaluate_weights(job, shown, reader, shares)
    mesh = agreed.layout.mesh
    return {
        "folder": str(folder.resolve()),
        "checkpoint": manifest.folder.name,
        "updates": totals.update,
        "epochs": totals.update // agreed.training_length.updates_per_epoch,
        "objective": run.objective.name,
        "prediction": "vote" if agreed.layout.objective.predicts_by_vote else "last block",
        "split": split,
        "samples": reader.dataset.size,
        "loss": found["test_loss"],
        "accuracy": found["test_accuracy"],
        "accuracy_vote": found["test_accuracy_vote"],
        "accuracy_per_block": found["accuracy_per_block"],
        "ranks": mesh.ranks,
        "stages": mesh.stages,
    }


def _read_run(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the run of a folder, as it was resolved, with other data where that is asked for."""
    for each in overrides:
        key = each.partition("=")[0].strip()
        if not key.startswith("data.") and key not in OVERRIDABLE_KEYS:
            raise ConfigError(
                "todo.key",
                f"--set {each}: what was trained stays as it is; evaluate takes data.*, "
                f"{' and '.join(OVERRIDABLE_KEYS)}",
            )
    path = folder / "run.toml"
    newest_checkpoint(folder)
    return replace(read_run(path, overrides), path=_source_path(path))


def _source_path(path: Path) -> Path:
    """Return the run file that a resolved one comes from."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    head, tail = RUN_FILE_HEADER.split("{}")
    if not (line.startswith(head) and line.endswith(tail)):
        raise ConfigError(
            "todo.key",
            f"the first line of {path} must say where relative paths and imports start: write "
            f"'{RUN_FILE_HEADER.format('/the/path/of/the/run/file.toml')}'",
        )
    return Path(line.removeprefix(head).removesuffix(tail))


def _fit_stages(run: RunConfig, ranks: int) -> RunConfig:
    """Return the run on as many stages as ranks and blocks allow; the others are replicas."""
    cut = run.partition
    blocks = len(cut.cuts) + 1 if cut.cuts is not None else cut.blocks or 1
    stages = max(n for n in range(1, min(ranks, blocks) + 1) if ranks % n == 0)
    return replace(run, mesh=replace(run.mesh, stages=stages))


def _replicas(totals: RunTotals) -> int:
    """Return on how many replicas a checkpoint was trained last."""
    return max(1, len(totals.peak_bytes) // max(1, len(totals.busy_s)))


def _load_checkpoint(job: RankJob, folder: Path) -> Manifest:
    """Load the newest checkpoint, or the one that has taken its place meanwhile. Collective."""
    control = job.groups.control
    for _ in range(MAX_RELOADS):
        first = all_or_none(
            control, lambda: None if control.rank else str(newest_checkpoint(folder).folder)
        )
        path = Path(control.allgather_object(first)[0])
        manifest = all_or_none(control, partial(_load_tensors, job, path))
        if all(control.allgather_object(manifest is not None)):
            assert manifest is not None
            return manifest
    raise ConfigError(
        "todo.key",
        f"{MAX_RELOADS} checkpoints in {folder / CHECKPOINT_FOLDER} were replaced while they were read: "
        "try again when the run has ended",
        agreed=True,
    )


def _load_tensors(job: RankJob, path: Path) -> Manifest | None:
    """Give this rank's blocks what a checkpoint shows; None where the checkpoint is gone."""
    tensors = [pair for block in job.engine.blocks.values() for pair in block.tensors().items()]
    held = {f"model/{name}": tensor for name, tensor in tensors}
    try:
        manifest = read_manifest(path)
        for key, tensor in manifest.verify_and_load(held).items():
            held[key].copy_(tensor)
    except (DtrainError, OSError):
        if path.is_dir():
            raise
        return None  # the run that goes on has put a newer one in its place
    return manifest
