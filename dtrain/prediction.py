"""Predict with the newest checkpoint of a run: the model's outputs for new samples, in order.

Invariant: samples are cut into micro-batches whatever the ranks are, so any ranks give the same
outputs. They are standardised as in the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtrain.build import RankJob, reads_inputs
from dtrain.checkpoint.files import replacing
from dtrain.comm.agree import all_or_none
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.data import open_samples
from dtrain.data.array_source import ArraySource, MemorySource
from dtrain.data.dataset import Dataset, IntegerInputs, Label
from dtrain.data.formats.file_set import check_numeric
from dtrain.data.node_memory import hold_on_node
from dtrain.data.reading.loader import Loader
from dtrain.data.sampler import Indices, even_ranges
from dtrain.data.source_dataset import SourceDataset
from dtrain.data.statistics.standardise import Standardised
from dtrain.errors import ConfigError, DataError
from dtrain.evaluation import load_checkpoint

SPLITS = ("train", "test")

BATCHES_PER_GATHER = 32
"""Micro-batches of each replica whose outputs are in memory together."""


def predict_run(
    folder: Path,
    comm: Comm,
    data: Any,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    run: RunConfig | None = None,
) -> NDArray[Any] | None:
    """Return the model's outputs for samples, (rows, ...), in their order; on rank 0 alone.

    Collective over `comm`. It is read-only and takes no lock, so the run may still be training.

    Parameters
    ----------
    folder : Path
        The run folder.
    data : array, tensor, tuple of arrays, or str
        Samples (rows, ...) as the data of the run have them, for several inputs a tuple; or a file
        of HDF5, `.npz`, `.npy`, `.csv` or IDX, with names as the test split has them; or "train" or
        "test", a split of the run.
    out : Path, optional
        An HDF5 file for the outputs, as `output` (rows, ...); for labels also `prediction` (rows,),
        the class of the largest output, and `label` (rows,), its stored label, where classes have
        other numbers (`[data] labels`). Then nothing is returned, and only a part of the outputs is
        in memory at any time.
    overrides, run
        As in `evaluate_run`.

    Raises
    ------
    ConfigError
        There is no run, no checkpoint, or a key may not be set; on all ranks, as all errors.
    DataError
        The samples are missing or do not fit the model.
    """
    splits = [data] if isinstance(data, str) and data in SPLITS else []
    job, manifest = load_checkpoint(folder, comm, overrides, run, splits=splits)
    dataset = all_or_none(comm, lambda: _open_samples(job, data))
    if not splits:
        hold_on_node(
            {"samples": dataset},
            comm,
            reads_inputs=reads_inputs(job.plan, comm.rank),
            owned=isinstance(data, str | Path),
        )
    outputs = _outputs(job, dataset)
    if out is None:
        parts = [output.numpy() for output in outputs]
        return np.concatenate(parts) if comm.rank == 0 else None
    facts = {"run": str(folder.resolve()), "checkpoint": manifest.folder.name}
    _write(out, outputs, job, dataset.size, facts)
    return None


def _outputs(job: RankJob, dataset: Dataset) -> Iterator[Tensor]:
    """Yield the outputs in the order of the samples, on rank 0. Collective over all ranks."""
    settings = job.plan.run.settings
    rows = -(-settings.batch_size // settings.micro_batches)
    if dataset.graph is not None:
        rows = dataset.size
    batches = [np.arange(i, min(i + rows, dataset.size)) for i in range(0, dataset.size, rows)]
    replicas = job.position.mesh.replicas
    loader = Loader(dataset, job.plan.layout.dtype)
    for start in range(0, len(batches), BATCHES_PER_GATHER * replicas):
        part = batches[start : start + BATCHES_PER_GATHER * replicas]
        own_range = even_ranges(len(part), replicas)[job.position.replica]
        with job.groups.control.without_counting():
            outputs = job.evaluator.predict(loader, part[own_range.start : own_range.stop])
            yield from _gather(job, part, outputs)


def _gather(job: RankJob, batches: Sequence[Indices], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of all replicas on rank 0, in order; elsewhere none."""
    control, mesh = job.groups.control, job.position.mesh
    rows = control.allgather_object([[list(o.shape), str(o.dtype)[6:]] for o in outputs])
    last_stage = job.plan.layout.place[-1]
    sources = [mesh.rank(replica, last_stage) for replica in range(mesh.replicas)]
    if control.rank and control.rank in sources:
        for output in outputs:
            control.isend(output.contiguous(), 0, 0)
        control.flush()
    gathered: list[Tensor] = []
    for source in sources if control.rank == 0 else ():
        if source == 0:
            gathered += outputs
            continue
        specs = [(tuple(shape), getattr(torch, dtype)) for shape, dtype in rows[source]]
        control.post_recv(source, 0, specs)
        for _ in specs:
            message = control.recv(source, 0)
            assert isinstance(message, Tensor)
            gathered.append(message)
    assert control.rank or len(gathered) == len(batches)
    return gathered


def _write(
    out: Path, outputs: Iterator[Tensor], job: RankJob, rows: int, facts: Mapping[str, str]
) -> None:
    """Write the outputs to a file on rank 0. Collective over all ranks."""
    if job.groups.control.rank:
        for _ in outputs:
            pass
        return
    task, labels = job.plan.layout.task, job.plan.data.train.class_labels
    try:
        with replacing(out) as draft, h5py.File(draft, "w") as file:
            file.attrs.update(facts)
            start = 0
            for output in outputs:
                if "output" not in file:
                    shape = (rows, *output.shape[1:])
                    file.create_dataset("output", shape, output.numpy().dtype)
                    if task.class_per_sample:
                        file.create_dataset("prediction", (rows,), "int64")
                    if task.class_per_sample and labels:
                        file.create_dataset("label", (rows,), _label_dtype(labels))
                part = slice(start, start + len(output))
                file["output"][part] = output.numpy()
                if task.class_per_sample:
                    file["prediction"][part] = classes = output.argmax(1).numpy()
                if "label" in file:
                    file["label"][part] = [labels[number] for number in classes]
                start += len(output)
    except OSError as error:
        raise ConfigError(
            "predict.unwritable", f"cannot write {out}: {error}; choose another file"
        ) from error


def _label_dtype(labels: Sequence[Label]) -> Any:
    """Return the dtype of stored labels in an HDF5 file."""
    return h5py.string_dtype() if isinstance(labels[0], str) else np.array(labels).dtype


def _open_samples(job: RankJob, data: Any) -> Dataset:
    """Return samples as a data set, standardised as in the training."""
    splits = {"train": job.plan.data.train, "test": job.plan.data.test}
    if isinstance(data, str) and data in splits:
        return splits[data]
    reference = splits["test"]
    sources = _open_sources(job, data)
    first = sources[0]
    if first.shape[1:] != reference.shape or not len(first):
        raise DataError(
            "predict.shape",
            f"the samples have shape {tuple(first.shape)}, but the run was trained on samples of "
            f"{reference.shape}: give (rows, {', '.join(map(str, reference.shape))}), at least one "
            "row",
        )
    if len(sources) != 1 + len(reference.other_inputs):
        raise DataError(
            "predict.inputs",
            f"the samples have {len(sources)} inputs, but the run was trained on samples of "
            f"{1 + len(reference.other_inputs)}: give a tuple of arrays, one per input",
        )
    if any(len(source) != len(first) for source in sources):
        raise DataError(
            "predict.lengths",
            f"the inputs have {[len(s) for s in sources]} rows: give as many each",
        )
    zero = torch.zeros(1, dtype=reference.target_dtype).numpy()  # these targets are never read
    targets = np.broadcast_to(zero.reshape(()), (len(first), *reference.target_shape))
    dataset = SourceDataset(sources, MemorySource(targets), reference.classes)
    if isinstance(reference, IntegerInputs):
        return IntegerInputs(dataset)
    if not isinstance(reference, Standardised):
        return dataset
    standardised = Standardised(dataset, reference.training)
    if job.evaluator.needs_samples:
        standardised.use_statistics(reference.statistics())
    return standardised


def _open_sources(job: RankJob, data: Any) -> tuple[ArraySource, ...]:
    """Return the inputs of samples, those of a file read from it."""
    if isinstance(data, str | Path):
        return _open_file(job, Path(data))
    items = data if isinstance(data, tuple) else (data,)
    arrays = (
        item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
        for item in items
    )
    return tuple(MemorySource(array, "the samples") for array in arrays)


def _open_file(job: RankJob, path: Path) -> tuple[ArraySource, ...]:
    run, task = job.plan.run, job.plan.layout.task
    if not path.exists():
        raise DataError(
            "predict.unreadable",
            f"cannot read samples from {path}, which does not exist: give a file of HDF5, .npz, "
            f".npy, .csv or IDX, or one of {', '.join(SPLITS)}",
        )
    sources = open_samples(path, run.dataset.name, run.dataset.fields, run.folder, task)
    for source in sources:
        check_numeric(source)
    return sources
