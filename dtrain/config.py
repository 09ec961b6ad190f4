"""Run files: TOML in, one checked `Run` out, and the resolved text that a run folder keeps.

Invariant: after `read` everything that a run file can get wrong by itself is refused; what depends
on the data or on the number of ranks is refused by `layout`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from dtrain import optimizers
from dtrain.errors import Refusal, unknown
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.objective import Objective
from dtrain.schedules import SCHEDULES
from dtrain.schedules.schedule import Schedule
from dtrain.syncs import SYNCS
from dtrain.syncs.sync import Sync
from dtrain.tables import Table, fill, kebab, snake, unfill

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A strategy that is made later, once its surroundings are known: a name and its fields."""

    name: str
    fields: Table

    def table(self) -> Table:
        """Return the table of a run file that makes this choice."""
        return {"name": self.name} | {kebab(key): value for key, value in self.fields.items()}


@dataclass(frozen=True)
class Data:
    """``[data]``: keys that every data set has; the others belong to the named one."""

    normalise: bool = True
    shuffle: Literal["full", "chunks"] = "full"
    augment: Literal["none"] = "none"


@dataclass(frozen=True)
class Grid:
    """``[mesh]``: ranks along the model, and which axis stays inside a node."""

    stages: int | None = None
    placement: Literal["stages-in-node", "replicas-in-node"] = "stages-in-node"


@dataclass(frozen=True)
class Cut:
    """``[partition]``: where blocks begin; `cuts` says it outright, else costs are balanced."""

    blocks: int | None = None
    balance: Literal["flops", "parameters", "layers"] = "flops"
    weights: tuple[float, ...] | None = None
    cuts: tuple[int | str, ...] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """``[checkpoint]``: updates between two (0: every epoch), and how many are kept."""

    every: int = 0
    keep: int = 2


@dataclass(frozen=True)
class Evaluate:
    """``[evaluate]``: epochs between two evaluations."""

    every: int = 1


@dataclass(frozen=True)
class Log:
    """``[log]``: seconds between two lines of progress."""

    every_s: float = 10.0


@dataclass(frozen=True)
class Top:
    """The keys outside any table."""

    seed: int = 0
    epochs: int | None = None
    updates: int | None = None
    batch_size: int = 128
    micro_batches: int = 1
    segment: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    threads: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Run:
    """One checked run file.

    Attributes
    ----------
    path : Path
        The file itself; relative paths and imports start in its folder.
    """

    path: Path
    top: Top
    data: Data
    dataset: Choice
    model: Choice
    mesh: Grid
    partition: Cut
    objective: Choice
    schedule: Choice
    sync: Choice
    optimizer: Choice
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    log: Log = field(default_factory=Log)

    @property
    def folder(self) -> Path:
        """Where relative paths and imports start."""
        return self.path.parent

    def make_objective(self) -> Objective:
        """Return the objective, made from its fields."""
        return make(OBJECTIVES, self.objective, "objective")

    def make_schedule(self) -> Schedule:
        """Return the schedule, made from its fields."""
        return make(SCHEDULES, self.schedule, "schedule")

    def make_sync(self) -> Sync:
        """Return a new sync, one for each block."""
        return make(SYNCS, self.sync, "sync")

    def table(self) -> Table:
        """Return the resolved run as the nested tables of a run file, defaults included."""
        tables = {
            "data": self.dataset.table() | unfill(self.data),
            "model": self.model.table(),
            "mesh": unfill(self.mesh),
            "partition": unfill(self.partition),
            "objective": self.objective.table(),
            "schedule": self.schedule.table(),
            "sync": self.sync.table(),
            "optimizer": self.optimizer.table(),
            "checkpoint": unfill(self.checkpoint),
            "evaluate": unfill(self.evaluate),
            "log": unfill(self.log),
        }
        return unfill(self.top) | tables

    def fixed(self, blocks: int, stages: int) -> Run:
        """Return this run with the numbers of blocks and stages that were settled at its start."""
        mesh = dataclasses.replace(self.mesh, stages=stages)
        partition = self.partition
        if partition.cuts is None:
            partition = dataclasses.replace(partition, blocks=blocks)
        return dataclasses.replace(self, mesh=mesh, partition=partition)


def read(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file, apply ``KEY=VALUE`` overrides and check everything that it says.

    Raises
    ------
    Refusal
        The file is missing, is no TOML, or has an unknown key or name or an impossible value.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(f"cannot read the run file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    try:
        return parse(table, path.resolve())
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal.message}", refusal.code) from refusal


def parse(table: Mapping[str, Any], path: Path) -> Run:
    """Check the nested tables of a run file and return them as a `Run`."""
    tables = ["data", "model", "mesh", "partition", "objective", "schedule", "sync", "optimizer"]
    tables += ["checkpoint", "evaluate", "log"]
    plain = {key: value for key, value in table.items() if key not in tables}
    top = fill(Top, plain, "", known=tables)
    parts = {name: _subtable(table, name) for name in tables}
    common = [kebab(each.name) for each in dataclasses.fields(Data)]
    objective = _choice(parts["objective"], "objective", OBJECTIVES, "mono-forward")
    default = OBJECTIVES[objective.name].schedule
    run = Run(
        path=path,
        top=top,
        data=fill(Data, {k: v for k, v in parts["data"].items() if k in common}, "[data] "),
        dataset=_named({k: v for k, v in parts["data"].items() if k not in common}, "data"),
        model=_named(parts["model"], "model"),
        mesh=fill(Grid, parts["mesh"], "[mesh] "),
        partition=fill(Cut, parts["partition"], "[partition] "),
        objective=objective,
        schedule=_choice(parts["schedule"], "schedule", SCHEDULES, default),
        sync=_choice(parts["sync"], "sync", SYNCS, "every-step"),
        optimizer=_named(parts["optimizer"], "optimizer"),
        checkpoint=fill(Checkpoint, parts["checkpoint"], "[checkpoint] "),
        evaluate=fill(Evaluate, parts["evaluate"], "[evaluate] "),
        log=fill(Log, parts["log"], "[log] "),
    )
    _ranges(run)
    optimizers.check(run.optimizer.name, run.optimizer.fields)
    return run


def _ranges(run: Run) -> None:
    """Refuse numbers that are out of range and keys that exclude each other."""
    top, cut = run.top, run.partition
    least = {
        "batch-size": (top.batch_size, 1),
        "micro-batches": (top.micro_batches, 1),
        "segment": (top.segment, 0),
        "epochs": (top.epochs, 1),
        "updates": (top.updates, 1),
        "threads": (None if top.threads == "auto" else top.threads, 1),
        "[mesh] stages": (run.mesh.stages, 1),
        "[partition] blocks": (cut.blocks, 1),
        "[checkpoint] every": (run.checkpoint.every, 0),
        "[checkpoint] keep": (run.checkpoint.keep, 1),
        "[evaluate] every": (run.evaluate.every, 1),
    }
    for key, (value, low) in least.items():
        if value is not None and value < low:
            raise Refusal(f"{key} = {value} is too small: give at least {low}")
    if (top.epochs is None) == (top.updates is None):
        found = "neither stands there" if top.epochs is None else "both stand there"
        raise Refusal(f"a run has a length: give epochs or updates ({found})")
    if cut.cuts is not None and (cut.blocks is not None or cut.weights is not None):
        raise Refusal("[partition] cuts say where every block starts: leave out blocks and weights")


def make(kinds: Mapping[str, type[T]], choice: Choice, what: str) -> T:
    """Return the named strategy of `kinds`, its fields checked against its own."""
    if choice.name not in kinds:
        raise unknown(what, choice.name, kinds)
    table = {kebab(key): value for key, value in choice.fields.items()}
    return fill(kinds[choice.name], table, f"[{what}] ")


def _subtable(table: Mapping[str, Any], name: str) -> Table:
    part = table.get(name, {})
    if not isinstance(part, dict):
        raise Refusal(f'{name} is a table: write [{name}] and name = "{part}" under it')
    return part


def _named(table: Table, what: str) -> Choice:
    """Return the choice a table makes; which names and fields are legal is found out later."""
    name = table.get("name")
    if not isinstance(name, str):
        raise Refusal(f'[{what}] needs name = "..."')
    return Choice(name, {snake(key): value for key, value in table.items() if key != "name"})


def _choice(table: Table, what: str, kinds: Mapping[str, type[Any]], default: str) -> Choice:
    """Return the choice a table makes among `kinds`, with all its fields spelled out."""
    choice = _named({"name": default} | table, what)
    made = make(kinds, choice, what)
    return Choice(choice.name, {f.name: getattr(made, f.name) for f in dataclasses.fields(made)})


def _override(table: Table, override: str) -> None:
    """Apply one ``KEY=VALUE`` to the nested tables; a value that is no TOML is a text."""
    path, equals, value = override.partition("=")
    *outer, key = path.strip().split(".")
    if not equals or not key:
        raise Refusal(f"--set {override}: write KEY=VALUE, as in --set optimizer.lr=0.01")
    for name in outer:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise Refusal(f"--set {override}: '{name}' is not a table")
    try:
        table[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = value
