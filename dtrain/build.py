"""RankJob: the engine, loaders and communicators of one rank, made from a plan.

Invariant: nothing is written before every rank has accepted the run. Each step is local work on
values that all ranks share, so all ranks raise or none. The ranks compare their layouts before they
train, and the replicas of a block start with equal weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from dtrain.block.block import Block
from dtrain.block.complex_tensors import real_view
from dtrain.block.device import keep_freed_memory, select_device
from dtrain.checkpoint.saved_fingerprint import COMPARED_SAMPLES, OTHER_INPUTS, STRUCTURE
from dtrain.comm.agree import all_or_none
from dtrain.comm.buffers import describe_tensor
from dtrain.comm.communicator import Comm
from dtrain.comm.groups import ProcessGroups
from dtrain.config.run import RunConfig
from dtrain.data.augment import build_augment
from dtrain.data.conversion import Array
from dtrain.data.item_sources import ItemTargets
from dtrain.data.node_memory import hold_on_node
from dtrain.data.reading.loader import Loader
from dtrain.data.reading.worker_pool import WorkerPool
from dtrain.data.sampler import even_ranges
from dtrain.data.statistics.standardise import unstandardised
from dtrain.data.torch_datasets import TargetsNeeded, read_targets, shared_target_pass
from dtrain.engine.engine import Engine
from dtrain.engine.evaluator import Evaluator
from dtrain.engine.spec import EngineSpec
from dtrain.errors import ConfigError, DataError
from dtrain.mesh import RankPosition
from dtrain.objectives.messages import reads_samples
from dtrain.planning.block_factory import make_blocks
from dtrain.planning.layout_table import layout_rows
from dtrain.planning.plan import Plan, make_plan
from dtrain.syncs.replica_check import checksum


@dataclass(frozen=True)
class RankJob:
    """A plan, and the objects with which this rank runs it.

    Attributes
    ----------
    engine, evaluator : Engine, Evaluator
        They train and evaluate.
    train_loader, test_loader : Loader
        They read the samples of both splits.
    validation_loader : Loader or None
        It reads the samples of the validation split, where there is one.
    workers : WorkerPool or None
        The worker processes of the loaders, where the run has some.
    groups : ProcessGroups
        The communicators of this rank.
    copied_blocks : list of int
        Blocks whose initial weights differed between replicas, so that all replicas have those of
        the first one; of all stages, in order.
    model_fingerprint : dict of str to str
        Shape and dtype of every parameter and buffer of the model, by name.
    """

    plan: Plan
    engine: Engine
    evaluator: Evaluator
    train_loader: Loader
    test_loader: Loader
    validation_loader: Loader | None
    workers: WorkerPool | None
    groups: ProcessGroups
    copied_blocks: list[int]
    model_fingerprint: dict[str, str]

    @property
    def position(self) -> RankPosition:
        """This rank's coordinates on the mesh."""
        return self.engine.position

    def start_workers(self) -> None:
        """Start the worker processes, if this rank reads inputs and the data set needs them.

        Raises
        ------
        ConfigError
            The data set or its augmentation cannot be sent to other processes.
        """
        if self.engine.needs_samples or self.evaluator.needs_samples:
            for loader in (self.train_loader, self.test_loader, self.validation_loader):
                if loader is not None:
                    loader.start_workers()


def make_plan_together(run: RunConfig, comm: Comm) -> Plan:
    """Make the plan of a run on all ranks. Collective over `comm`.

    Labels that only the items of a torch Dataset have are read once, each rank a part of them.

    Raises
    ------
    DtrainError
        On all ranks.
    """
    known: dict[int, Array] = {}
    while comm.size > 1:
        with shared_target_pass(known) as target_pass:
            plan = all_or_none(comm, lambda: _plan_or_none(run, comm.size))
        if plan is not None:
            return plan
        for number, targets in enumerate(target_pass.pending):
            known[number] = _read_targets_together(targets, comm)
    return make_plan(run, comm.size)


def _plan_or_none(run: RunConfig, ranks: int) -> Plan | None:
    """Return the plan; None where targets are to be read first."""
    try:
        return make_plan(run, ranks)
    except TargetsNeeded:
        return None


def _read_targets_together(targets: ItemTargets, comm: Comm) -> Array:
    """Return the targets of all items. Collective over `comm`."""
    rows = even_ranges(len(targets), comm.size)[comm.rank]
    own = all_or_none(comm, lambda: read_targets(targets, rows))
    with comm.without_counting():
        parts = comm.allgather_object(own.tolist())
    return np.array([label for part in parts for label in part], targets.dtype)


def build_rank(plan: Plan, comm: Comm) -> RankJob:
    """Make this rank's blocks with their initial weights, and its communicators.

    Collective over all ranks.
    """
    layout, settings = plan.layout, plan.run.settings
    if settings.debug:
        comm.context.debug()
    replica, stage = layout.mesh.coords(comm.rank)
    position = RankPosition(layout.mesh, replica, stage, layout.place)
    groups = ProcessGroups(
        replicas=comm.split(stage, replica, "replicas"),
        pipeline=comm.split(replica, stage, "pipeline"),
        forward=comm.dup("forward"),
        backward=comm.dup("backward"),
        control=comm,
    )
    local_rank, host = comm.topology.local_rank, comm.hosts[comm.rank]
    device = all_or_none(comm, lambda: select_device(settings.device, local_rank, host))
    comm.set_device(device)
    indices = layout.blocks_of_stage(stage)
    blocks = all_or_none(comm, lambda: make_blocks(plan.run, layout, indices, device))
    _check_no_decay(plan, blocks, comm)
    copied_blocks = _equalise_replicas(blocks, groups)
    model_fingerprint = _model_fingerprint(blocks, groups)
    syncs = {index: plan.run.new_sync() for index in blocks}
    for index, sync in syncs.items():
        sync.setup(blocks[index], groups.replicas)
    engine_spec = _engine_spec(plan, device)
    workers, loaders = _make_loaders(plan)
    return RankJob(
        plan=plan,
        engine=Engine(position, groups, blocks, syncs, engine_spec),
        evaluator=Evaluator(position, groups, blocks, engine_spec),
        train_loader=loaders["train"],
        test_loader=loaders["test"],
        validation_loader=loaders.get("validation"),
        workers=workers,
        groups=groups,
        copied_blocks=copied_blocks,
        model_fingerprint=model_fingerprint,
    )


def _make_loaders(plan: Plan) -> tuple[WorkerPool | None, dict[str, Loader]]:
    """Return the worker processes of this rank, and the loaders by name of the split."""
    run, dtype = plan.run, plan.layout.dtype
    workers = WorkerPool(run.data.workers) if run.data.workers else None
    augment = build_augment(run.data.augment, run.settings.seed, run.folder)
    return workers, {
        name: Loader(split, dtype, augment if name == "train" else None, workers=workers)
        for name, split in plan.data.by_name().items()
    }


def _check_no_decay(plan: Plan, blocks: Mapping[int, Block], comm: Comm) -> None:
    """Refuse patterns of parameters without weight decay that match none. Collective over all."""
    patterns = plan.run.optimizer_options.no_decay
    if not patterns:
        return
    named = [parameter for block in blocks.values() for parameter in block.named_parameters()]
    own_matches = [p for p in patterns if any(parameter.matches(p) for parameter in named)]
    matches = {pattern for row in comm.allgather_object(own_matches) for pattern in row}
    for pattern in patterns:
        if pattern not in matches:
            raise ConfigError(
                "optimizer.no-decay-unmatched",
                f'[optimizer] no-decay: "{pattern}" is in no parameter\'s name and in no class of '
                "a module with parameters: correct it, or leave it out",
                on_all_ranks=True,
            )


def _equalise_replicas(blocks: Mapping[int, Block], groups: ProcessGroups) -> list[int]:
    """Give all replicas of a block the weights of the first one where they differ.

    Collective over all ranks. Initial weights differ where a user's function draws them from
    generators that dtrain does not seed. Returns the blocks that differed, of all stages.
    """
    replicas, copied = groups.replicas, []
    for index, block in blocks.items() if replicas.size > 1 else ():
        tensors = block.tensors()
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
        first, *others = replicas.allgather_object(checksums)
        names = [n for n in tensors if any(other[n] != first[n] for other in others)]
        if names:
            with replicas.without_counting():
                replicas.broadcast_({name: tensors[name] for name in names})
            copied.append(index)
    all_copied = groups.control.allgather_object(copied) if groups.control.size > 1 else [copied]
    return sorted({index for indices in all_copied for index in indices})


def _model_fingerprint(blocks: Mapping[int, Block], groups: ProcessGroups) -> dict[str, str]:
    """Return shape and dtype of the tensors of all stages, by name, and the structure of the
    layers. Collective over all ranks."""
    own_texts = {STRUCTURE: f"dtrain {version('dtrain')}, torch {torch.__version__}"}
    for block in blocks.values():
        own_texts |= {name: describe_tensor(tensor) for name, tensor in block.tensors().items()}
        own_texts |= {STRUCTURE + name: text for name, text in block.structure().items()}
    rows = groups.pipeline.allgather_object(own_texts)
    return {name: text for row in rows for name, text in sorted(row.items())}


def _engine_spec(plan: Plan, device: torch.device) -> EngineSpec:
    run, layout, options = plan.run, plan.layout, plan.run.optimizer_options
    return EngineSpec(
        objective=layout.objective,
        schedule=layout.schedule,
        block_specs=layout.block_specs,
        lr_schedule=run.lr_schedule.instance,
        clip=options.clip,
        clips_model=options.clip > 0 and options.clip_over == "model",
        device=device,
        seed=run.settings.seed,
        training_length=plan.training_length,
        wire_format=layout.wire_format,
        ties=layout.ties,
        task=layout.task,
        max_skipped=run.numerics.skip_limit,
        check_replicas=run.numerics.check_replicas,
    )


def check_same_layout(plan: Plan, comm: Comm) -> None:
    """Verify that all ranks made the same plan. Collective over all ranks.

    Raises
    ------
    ConfigError
        On all ranks, if layouts differ; it names the first difference.
    """
    if comm.size == 1:
        return
    rows = layout_rows(plan.layout) | {"run": repr(plan.run.to_table())}
    rows = {key: re.sub(" at 0x[0-9a-f]+", "", text) for key, text in rows.items()}
    own_hash = blake2b(repr(rows).encode()).hexdigest()
    if len(set(comm.allgather_object(own_hash))) == 1:
        return
    first, *others = comm.allgather_object(rows)
    for rank, other in enumerate(others, 1):
        for key in {**first, **other}:
            if first.get(key) != other.get(key):
                raise ConfigError(
                    "layout.ranks-differ",
                    f"rank {rank} has another layout than rank 0: {key} is {other.get(key)} there "
                    f"and {first.get(key)} on rank 0; make the model the same in every process "
                    "(seed its random numbers), or set [partition] cuts",
                    on_all_ranks=True,
                )


def hold_data(plan: Plan, comm: Comm, used: Sequence[str] | None = None) -> bool:
    """Hold the data in memory once per node, as far as they fit. Collective over all ranks.

    Returns whether there were arrays to hold.

    Parameters
    ----------
    used : sequence of str, optional
        The splits that are read often; default: all of them. No other one is held.

    Raises
    ------
    DataError
        On all ranks, if the data cannot be read.
    """
    given = plan.run.dataset.target
    return hold_on_node(
        plan.data.by_name(),
        comm,
        reads_inputs=reads_inputs(plan, comm.rank),
        owned=given is None or callable(given),
        used=used,
    )


def reads_inputs(plan: Plan, rank: int) -> bool:
    """Return whether a rank reads samples, in training or in prediction."""
    if plan.layout.task.target == "input":
        return True
    _, stage = plan.layout.mesh.coords(rank)
    objective = plan.layout.objective
    specs = [plan.layout.block_specs[index] for index in plan.layout.blocks_of_stage(stage)]
    return any(
        reads_samples(objective, spec, "train") or reads_samples(objective, spec, "predict")
        for spec in specs
    )


def check_same_data(plan: Plan, comm: Comm) -> dict[str, Any]:
    """Verify on some samples that all ranks read the same data. Collective over all ranks.

    Inputs and labels are read by different stages. So a data function with unseeded random numbers
    would pair the images of one rank with the labels of another. Returns what identifies the data
    in a later start: sizes, a hash of some labels, and a number for each of some inputs.

    Raises
    ------
    DataError
        On all ranks, if labels or inputs differ.
    """
    fingerprints = comm.allgather_object(_fingerprint(plan, comm.rank))
    labels = {label_hash for label_hash, *_ in fingerprints}
    inputs = {input_hash for _, input_hash, *_ in fingerprints if input_hash is not None}
    if len(labels) > 1 or len(inputs) > 1:
        differing = "labels" if len(labels) > 1 else "inputs"
        raise DataError(
            "data.ranks-differ",
            f"the ranks read different {differing} from '{plan.run.dataset.name}': make the data "
            "the same in every process (seed its random numbers)",
            on_all_ranks=True,
        )
    words = {"train": "training"}
    splits = {f"{words.get(name, name)} split": s for name, s in plan.data.by_name().items()}
    sizes = {
        name: f"{split.size} samples of {list(split.shape)}, {split.classes} classes"
        for name, split in splits.items()
    }
    numbers = next(numbers for *_, numbers in fingerprints if numbers is not None)
    identity: dict[str, Any] = sizes | {"labels": min(labels)} | numbers
    return identity


def _fingerprint(plan: Plan, rank: int) -> tuple[str, str | None, dict[str, list[float]] | None]:
    """Return hashes of some labels, and of some inputs where this rank reads inputs.

    Inputs are read by the first stage at least, here before they are standardised. The numbers are
    weighted means of them, which hardly depend on the machine.
    """
    is_reader = reads_inputs(plan, rank)
    labels, inputs = blake2b(), blake2b()
    numbers, other_numbers = list[float](), list[float]()
    for split in plan.data.by_name().values():
        indices = np.unique(np.linspace(0, split.size - 1, COMPARED_SAMPLES).astype(np.int64))
        labels.update(str((split.size, split.shape, split.classes)).encode())
        labels.update(split.targets(indices).numpy().tobytes())
        if is_reader:
            stored = unstandardised(split).inputs(indices)
            inputs.update(stored.numpy().tobytes())
            numbers += _row_numbers(stored)
            for rows in split.read_other_inputs(indices):
                inputs.update(rows.numpy().tobytes())
                other_numbers += _row_numbers(rows)
    if not is_reader:
        return labels.hexdigest(), None, None
    others = {OTHER_INPUTS: other_numbers} if other_numbers else {}
    return labels.hexdigest(), inputs.hexdigest(), {"inputs": numbers} | others


def _row_numbers(rows: torch.Tensor) -> list[float]:
    """Return a weighted mean of each row."""
    values = real_view(rows).double().reshape(len(rows), -1)
    means: list[float] = (values * torch.linspace(0.5, 1.5, values.shape[1])).mean(1).tolist()
    return means


def set_threads(run: RunConfig, comm: Comm) -> int:
    """Set torch's threads of this rank; return their number. Collective over all ranks.

    ``OMP_NUM_THREADS`` has precedence, then the run file's number. The default is the number of
    cores that the ranks of this host may use, over the number of those ranks.
    """
    try:
        cores = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = list(range(os.cpu_count() or 1))
    all_cores = comm.allgather_object(cores)
    node_ranks = comm.topology.node_ranks
    node_cores = {core for rank in node_ranks for core in all_cores[rank]}
    setting = run.settings.threads
    fair_number = max(1, min(len(cores), len(node_cores) // len(node_ranks)))
    threads = fair_number if setting == "auto" else setting
    environment = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if environment.isdigit() and int(environment):
        threads = int(environment)
    torch.set_num_threads(threads)
    keep_freed_memory()
    with suppress(RuntimeError):  # it can be set once in a process
        torch.set_num_interop_threads(1)
    return threads
