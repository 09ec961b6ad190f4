"""Run: everything that a run file says, as one Python object.

Invariant: a `Run` and a run file are two spellings of one thing. A run is checked when it is made,
by the code that checks run files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

from torch import nn

from dtrain.block.lr_schedule import LRFunction, LRSchedule
from dtrain.config.parse import SECTIONS, parse_run, read_resolved_run, read_run
from dtrain.config.run import RUN_FILE_HEADER, RunConfig
from dtrain.config.sections import (
    Checkpoint,
    Ema,
    Evaluate,
    Log,
    Mesh,
    Numerics,
    Partition,
    Stop,
    Timeouts,
)
from dtrain.config.sweep import read_sweep
from dtrain.data.dataset import DatasetSplits
from dtrain.errors import ConfigError
from dtrain.object_names import script_file
from dtrain.objectives.base import Objective
from dtrain.paths import expand_path
from dtrain.schedules.base import Schedule
from dtrain.schema import Table, kebab, to_table
from dtrain.syncs.base import Sync
from dtrain.tasks.task import Task

RunTable: TypeAlias = Mapping[str, Any]
"""A table as in a run file; `name` may also be the object itself, and keys have _ or -."""


@final
@dataclass(frozen=True, init=False)
class Optimizer:
    """An optimizer of `torch.optim`, by name, with its own fields.

    Parameters
    ----------
    name : str
        "sgd", "adam", "adamw", "muon" and the like.
    clip : float, optional
        Largest norm of a gradient.
    clip_over : "block" or "model", optional
        The gradients whose norm is limited.
    no_decay : sequence of str, optional
        Parts of names of parameters that have no weight decay.
    rest : Optimizer, optional
        The optimizer of the parameters that are no hidden matrices.
    fields
        Fields of the optimizer: ``lr=1e-3``.
    """

    name: str
    fields: Table

    def __init__(self, name: str, *, rest: Optimizer | None = None, **fields: Any) -> None:
        if rest is not None:
            fields["rest"] = rest.table()
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "fields", fields)

    def table(self) -> Table:
        """Return the table of a run file."""
        values = {kebab(key): value for key, value in self.fields.items() if value is not None}
        return {"name": self.name} | values


PLAIN_SECTIONS = (
    *("mesh", "partition", "checkpoint", "evaluate", "log", "stop", "ema", "timeouts", "numerics"),
)
"""Sections that name no strategy."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One training: model, data, partition, strategies and length.

    Every section may be an object, a name as in run files, or a table of a run file as a dict
    (``{"name": "daso", "every": 4}``), in which `name` may be a class or a function of yours.

    Parameters
    ----------
    model : function, nn.Module, list of (str, factory), str or table
        The layers. A function may take `shape` (of one sample) and `classes`. A module is taken
        with the weights that it has on rank 0.
    data : arrays, function, DatasetSplits, str or table
        (x_train, y_train, x_test, y_test) as arrays or tensors with the samples first, with or
        without x_validation and y_validation at the end; a function that returns them;
        `dtrain.data.digits()`, `dtrain.data.hdf5(...)`; or a name.
    task : Task, str or table, optional
        Loss and metrics; a str is the name of a loss. Default: cross-entropy and accuracy.
    mesh : Mesh or table, optional
        Stages, and what stays inside a node. Default: all ranks are stages.
    partition : Partition or table, optional
        Where blocks start. Default: one block per stage, balanced by multiply-adds.
    objective : Objective, str or table
        What each block learns.
    schedule : Schedule, str or table, optional
        The order of computation. Default: that of the objective.
    sync : Sync, str or table
        How replicas agree.
    optimizer : Optimizer or table
        The optimizer of every block.
    lr : LRSchedule, function, str or table
        The learning-rate schedule; a function takes (update, updates per epoch, updates of the run)
        and returns the factor of the rate.
    epochs, updates : int, optional
        Length of the run; exactly one of them is set.
    batch_size : int
        Samples of an update, over all replicas.
    micro_batches : int
        Parts of a replica's samples of an update, computed one after the other.
    stop, ema : table, optional
        Early stopping and averaged weights; `dtrain.callbacks` has them as objects.
    numerics : table, optional
        Losses that are not finite, and the comparison of replicas.
    timeouts : table, optional
        Seconds without progress after which a hanging run ends.
    segment : int
        Updates between two pipeline flushes; 0: the checkpoint interval, else the epoch.
    seed : int
        Key of all random numbers.
    dtype, device, threads, debug, trace
        As in a run file.
    path : Path, optional
        Relative paths and imports start in its folder, and it names the run. Default: the script.
    overrides : sequence of str
        The ``KEY=VALUE`` that `read` has applied, for the commands that a run prints.

    Raises
    ------
    ConfigError
        A key or a name is unknown, or a value is impossible.
    """

    model: Callable[..., Any] | nn.Module | Sequence[tuple[str, Any]] | str | RunTable
    data: Sequence[Any] | Callable[..., Any] | DatasetSplits | str | RunTable
    task: Task | RunTable | str | None = None
    mesh: Mesh | RunTable | None = None
    partition: Partition | RunTable | None = None
    objective: Objective | type[Objective] | RunTable | str = "mono-forward"
    schedule: Schedule | type[Schedule] | RunTable | str | None = None
    sync: Sync | type[Sync] | RunTable | str = "every-step"
    optimizer: Optimizer | RunTable
    lr: LRSchedule | type[LRSchedule] | LRFunction | RunTable | str | None = None
    epochs: int | None = None
    updates: int | None = None
    batch_size: int = 128
    micro_batches: int = 1
    segment: int = 0
    checkpoint: Checkpoint | RunTable | None = None
    evaluate: Evaluate | RunTable | None = None
    log: Log | RunTable | None = None
    stop: Stop | RunTable | None = None
    ema: Ema | RunTable | None = None
    numerics: Numerics | RunTable | None = None
    timeouts: Timeouts | RunTable | None = None
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    debug: bool = False
    trace: bool = False
    path: Path | None = field(default=None, repr=False)
    overrides: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Check the run."""
        _ = self.config

    @cached_property
    def config(self) -> RunConfig:
        """The checked run, with all defaults filled in."""
        path = Path(self.path) if self.path is not None else script_file()
        path = Path.cwd() / "interactive" if path is None else path.resolve()
        return parse_run(self.table(), path, self.overrides)

    def table(self) -> Table:
        """Return the nested tables of a run file; a `name` may be an object."""
        table: Table = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in ("path", "overrides") or value is None:
                continue
            key = kebab(each.name)
            if key in SECTIONS:
                table[key] = _section_table(key, value)
            elif value != each.default:
                table[key] = value
        return table

    @classmethod
    def read(cls, path: str | Path, set: Sequence[str] = ()) -> Run:
        """Return the run of a run file, or of the `run.toml` in a run folder.

        Parameters
        ----------
        set : sequence of str
            ``KEY=VALUE`` with keys of run files, as in ``--set optimizer.lr=0.01``.
        """
        path = expand_path(path, "path")
        config = read_resolved_run(path, set) if _is_resolved(path) else read_run(path, set)
        return cls.from_config(config)

    @classmethod
    def read_sweep(cls, path: str | Path, set: Sequence[str] = ()) -> dict[str, Run]:
        """Return the runs of a run file with a table `[sweep]`, by the names of their folders.

        Parameters
        ----------
        set : sequence of str
            ``KEY=VALUE`` as in `read`, for all runs; a key of the sweep that is set leaves it.
        """
        path = Path(path)
        runs = read_sweep(path, set)
        return {run.name: cls.read(path, [*set, *run.settings]) for run in runs}

    @classmethod
    def from_config(cls, config: RunConfig) -> Run:
        """Return the run of a checked one."""
        table = {key.replace("-", "_"): value for key, value in config.to_table().items()}
        return cls(**table, path=config.path, overrides=config.overrides)

    def replace(self, **changes: Any) -> Run:
        """Return a copy with other arguments: ``run.replace(epochs=3)``."""
        if "epochs" in changes and "updates" not in changes:
            changes["updates"] = None
        elif "updates" in changes and "epochs" not in changes:
            changes["epochs"] = None
        return dataclasses.replace(self, **changes)

    def to_toml(self) -> str:
        """Return the text of the run file, with all defaults.

        An object without a name that a module defines is recorded by its name in Python and a
        fingerprint; such a file can be read in the script that made it alone.
        """
        return self.config.to_text()


def _section_table(key: str, value: Any) -> Table:
    """Return the table of a section."""
    if isinstance(value, Optimizer):
        return value.table()
    if isinstance(value, Mapping):
        return {kebab(str(name)): item for name, item in value.items()}
    if isinstance(value, str):
        return {"loss": value} if key == "task" else {"name": value}
    if isinstance(
        value, (Mesh, Partition, Checkpoint, Evaluate, Log, Stop, Ema, Timeouts, Numerics)
    ):
        defaults = to_table(type(value)())
        return {name: v for name, v in to_table(value).items() if v != defaults.get(name)}
    if key in (*PLAIN_SECTIONS, "optimizer"):
        raise ConfigError(
            "run.wrong-section",
            f"{key} = {value!r}: give dtrain.{key.capitalize()}(...) or a dict of the keys of "
            f"[{key}]",
        )
    return {"name": value}


def _is_resolved(path: Path) -> bool:
    """Return whether a run file names another one, where its paths and imports start."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().startswith(RUN_FILE_HEADER.partition("{}")[0])
    except (OSError, UnicodeDecodeError):
        return False
