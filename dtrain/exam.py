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

from dtrain import checkpoint
from dtrain.checkpoint import Manifest
from dtrain.comm.comm import Comm
from dtrain.config import Run, read
from dtrain.data import Reader, parts
from dtrain.data.batches import Indices, Shares
from dtrain.errors import Refusal
from dtrain.job import Job, alike, build, plan, threads, together
from dtrain.resume import CHECKPOINTS
from dtrain.tables import dump
from dtrain.totals import Totals, tested

Views = Mapping[int, Mapping[str, Tensor]]
Split = Literal["train", "test"]

ORIGIN = "# resolved from {}, where relative paths and imports start"
"""The first line of the `run.toml` of a run folder."""

SETTABLE = ("device", "threads")
"""What may be set anew beside keys of [data]: nothing that was trained."""

TURNS = 20
"""Checkpoints that may be replaced while they are read, one after the other."""


# ---- one exam


def views(job: Job) -> Views:
    """Return what the syncs show, by block. Collective; not counted as traffic."""
    with job.lines.control.uncounted():
        return {index: sync.view() for index, sync in job.engine.syncs.items()}


def grade(job: Job, views: Views, reader: Reader, shares: Shares) -> dict[str, Any]:
    """Return loss and accuracies of what `views` show, over all that `reader` has.

    Collective; not counted as traffic. The keys are those of a summary.

    Parameters
    ----------
    shares : Shares
        How the run cuts an update; its replicas need not be those of the job.
    """
    engine, control, seat = job.engine, job.lines.control, job.seat
    micros = sheets(reader.source.size, shares)
    own = parts(len(micros), seat.mesh.replicas)[seat.replica]
    with control.uncounted(), ExitStack() as shown:
        for index, block in engine.blocks.items():
            shown.enter_context(block.showing(views[index]))
        tallies = job.judge.predict(reader, micros[own.start : own.stop])
    rows = [
        {"micro": micro, "stage": seat.stage, **asdict(tally)}
        for micro, tally in zip(own, tallies, strict=True)
    ]
    told = [row for rank in control.exchange(rows) for row in rank]
    told.sort(key=lambda row: int(row["micro"]))
    return tested(told, len(engine.tasks), engine.objective.votes)


def sheets(size: int, shares: Shares) -> list[Indices]:
    """Return the micro-batches of a split: the parts of the run's replicas, cut as updates are."""
    rows = shares.largest
    return [
        np.arange(start, min(start + rows, part.stop))
        for part in parts(size, shares.replicas)
        for start in range(part.start, part.stop, rows)
    ]


# ---- the run folder, without a trace


def resolved(run: Run) -> str:
    """Return the text of `run.toml` in a run folder: where the run comes from, and all its keys."""
    return f"{ORIGIN.format(run.path)}\n{dump(run.table())}"


def examine(
    folder: Path, comm: Comm, split: Split = "test", overrides: Sequence[str] = ()
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
    Refusal
        On all ranks alike: no run, no checkpoint, a damaged one, data that do not fit.
    """
    run = together(comm, lambda: _asked(folder, overrides))
    threads(run, comm)
    agreed = together(comm, lambda: plan(_spread(run, comm.size), comm.size))
    alike(agreed, comm)
    job = build(agreed, comm)
    manifest = _load(job, folder)
    totals = Totals.read(manifest.state)
    shares = replace(agreed.shares, replicas=_replicas(totals))
    reader = job.test if split == "test" else Reader(agreed.data.train, agreed.layout.dtype)
    shown = {index: block.tensors() for index, block in job.engine.blocks.items()}
    found = grade(job, shown, reader, shares)
    mesh = agreed.layout.mesh
    return {
        "folder": str(folder.resolve()),
        "checkpoint": manifest.folder.name,
        "updates": totals.update,
        "epochs": totals.update // agreed.calendar.per_epoch,
        "objective": run.objective.name,
        "prediction": "vote" if agreed.layout.objective.votes else "last block",
        "split": split,
        "samples": reader.source.size,
        "loss": found["test_loss"],
        "accuracy": found["test_accuracy"],
        "accuracy_vote": found["test_accuracy_vote"],
        "accuracy_per_block": found["accuracy_per_block"],
        "ranks": mesh.ranks,
        "stages": mesh.stages,
    }


def _asked(folder: Path, overrides: Sequence[str]) -> Run:
    """Return the run of a folder, as it was resolved, with other data where that is asked for."""
    for each in overrides:
        key = each.partition("=")[0].strip()
        if not key.startswith("data.") and key not in SETTABLE:
            raise Refusal(
                f"--set {each}: what was trained stays as it is; evaluate takes data.*, "
                f"{' and '.join(SETTABLE)}"
            )
    path = folder / "run.toml"
    newest(folder)
    return replace(read(path, overrides), path=_origin(path))


def _origin(path: Path) -> Path:
    """Return the run file that a resolved one comes from."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    head, tail = ORIGIN.split("{}")
    if not (line.startswith(head) and line.endswith(tail)):
        raise Refusal(
            f"the first line of {path} must say where relative paths and imports start: write "
            f"'{ORIGIN.format('/the/path/of/the/run/file.toml')}'"
        )
    return Path(line.removeprefix(head).removesuffix(tail))


def newest(folder: Path) -> Manifest:
    """Return the newest complete checkpoint of a run; refuse where there is none."""
    if not folder.is_dir():
        raise Refusal(f"there is no run folder {folder}: give the one that `dtrain train` named")
    if not (folder / "run.toml").is_file():
        raise Refusal(f"{folder} holds no run.toml: give a folder that `dtrain train` named")
    where = folder / CHECKPOINTS
    manifest = checkpoint.latest(where)
    if manifest is None:
        raise Refusal(
            f"there is no complete checkpoint in {where}: a run writes one at the end of its first "
            "epoch (or sooner, by [checkpoint] every); let it come that far"
        )
    return manifest


def _spread(run: Run, ranks: int) -> Run:
    """Return the run on as many stages as ranks and blocks allow; the others are replicas."""
    cut = run.partition
    blocks = len(cut.cuts) + 1 if cut.cuts is not None else cut.blocks or 1
    stages = max(n for n in range(1, min(ranks, blocks) + 1) if ranks % n == 0)
    return replace(run, mesh=replace(run.mesh, stages=stages))


def _replicas(totals: Totals) -> int:
    """Return on how many replicas a checkpoint was trained last."""
    return max(1, len(totals.peak_bytes) // max(1, len(totals.busy_s)))


def _load(job: Job, folder: Path) -> Manifest:
    """Load the newest checkpoint, or the one that has taken its place meanwhile. Collective."""
    control = job.lines.control
    for _ in range(TURNS):
        first = together(control, lambda: None if control.rank else str(newest(folder).folder))
        path = Path(control.exchange(first)[0])
        manifest = together(control, partial(_loaded, job, path))
        if all(control.exchange(manifest is not None)):
            assert manifest is not None
            return manifest
    raise Refusal(
        f"{TURNS} checkpoints in {folder / CHECKPOINTS} were replaced while they were read: "
        "try again when the run has ended",
        agreed=True,
    )


def _loaded(job: Job, path: Path) -> Manifest | None:
    """Give this rank's blocks what a checkpoint shows; None where the checkpoint is gone."""
    tensors = [pair for block in job.engine.blocks.values() for pair in block.tensors().items()]
    held = {f"model/{name}": tensor for name, tensor in tensors}
    try:
        manifest = checkpoint.read(path)
        for key, tensor in manifest.verified(held).items():
            held[key].copy_(tensor)
    except (Refusal, OSError):
        if path.is_dir():
            raise
        return None  # the run that goes on has put a newer one in its place
    return manifest
