"""Run files: TOML in, one checked `Run` out, and the resolved text that a run folder keeps.

Invariant: after `read` everything that a run file can get wrong by itself is refused; what depends
on the data or on the number of ranks is refused by `layout`.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain import optimizers
from dtrain.errors import Refusal
from dtrain.foretell import scaled
from dtrain.keys import Checkpoint, Choice, Cut, Data, Evaluate, Grid, Log, Step, Top
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.objective import Objective
from dtrain.rates import RATES, Rate
from dtrain.sanity import check
from dtrain.schedules import SCHEDULES
from dtrain.schedules.schedule import Schedule
from dtrain.syncs import SYNCS
from dtrain.syncs.sync import Sync
from dtrain.tables import Table, fill, kebab, load, make, snake, unfill


@dataclass(frozen=True)
class Run:
    """One checked run file.

    Attributes
    ----------
    path : Path
        The file itself; relative paths and imports start in its folder.
    overrides : tuple of str
        What ``--set`` changed, as it was typed.
    """

    path: Path
    overrides: tuple[str, ...]
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
    step: Step
    rate: Choice
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    log: Log = field(default_factory=Log)

    @property
    def folder(self) -> Path:
        """Where relative paths and imports start."""
        return self.path.parent

    def make_objective(self) -> Objective:
        """Return the objective, made from its fields."""
        return make(OBJECTIVES, self.objective.table(), "objective")

    def make_schedule(self) -> Schedule:
        """Return the schedule, made from its fields."""
        return make(SCHEDULES, self.schedule.table(), "schedule")

    def make_sync(self) -> Sync:
        """Return a new sync, one for each block."""
        return make(SYNCS, self.sync.table(), "sync")

    def make_rate(self) -> Rate:
        """Return the schedule of learning rates, made from its fields."""
        return make(RATES, self.rate.table(), "lr")

    def step_fields(self) -> Table:
        """Return the optimizer's fields, learning rate and momentum for the batch that there is."""
        fields, reference = dict(self.optimizer.fields), self.step.scale_from
        if reference:
            given = fields.get("lr", optimizers.LR), fields["momentum"]
            fields["lr"], fields["momentum"] = scaled(*given, self.top.batch_size, reference)
        return fields

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
            "optimizer": self.optimizer.table() | self.step.table(),
            "lr": self.rate.table(),
            "checkpoint": unfill(self.checkpoint),
            "evaluate": unfill(self.evaluate),
            "log": unfill(self.log),
        }
        if self.partition.cuts is not None:
            del tables["partition"]["balance"]  # nothing is balanced
        return unfill(self.top) | tables

    def going_on(self, table: Table | None) -> Run:
        """Return this run with as many blocks as a checkpoint's `table`, where it names none.

        Without it another number of stages would be another training.
        """
        known = (table or {}).get("partition", {}).get("blocks")
        if known is None or self.partition.blocks is not None or self.partition.cuts is not None:
            return self
        return dataclasses.replace(
            self, partition=dataclasses.replace(self.partition, blocks=known)
        )

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
    table = load(path, "run file")
    for override in overrides:
        _override(table, override)
    try:
        return parse(table, path.resolve(), overrides)
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal.message}", refusal.code) from refusal


def parse(table: Mapping[str, Any], path: Path, overrides: Sequence[str] = ()) -> Run:
    """Check the nested tables of a run file and return them as a `Run`."""
    tables = ["data", "model", "mesh", "partition", "objective", "schedule", "sync", "optimizer"]
    tables += ["lr", "checkpoint", "evaluate", "log"]
    plain = {key: value for key, value in table.items() if key not in tables}
    top = fill(Top, plain, "", known=tables)
    parts = {name: _subtable(table, name) for name in tables}
    if {"cuts", "balance"} <= parts["partition"].keys():
        raise Refusal("[partition] cuts say where every block starts: leave out balance")
    common = [kebab(each.name) for each in dataclasses.fields(Data)]
    ours = [kebab(each.name) for each in dataclasses.fields(Step)]
    objective = _choice(parts["objective"], "objective", OBJECTIVES, "mono-forward")
    default = make(OBJECTIVES, objective.table(), "objective").schedule
    run = Run(
        path=path,
        overrides=tuple(overrides),
        top=top,
        data=fill(Data, {k: v for k, v in parts["data"].items() if k in common}, "[data] "),
        dataset=_named({k: v for k, v in parts["data"].items() if k not in common}, "data"),
        model=_named(parts["model"], "model"),
        mesh=fill(Grid, parts["mesh"], "[mesh] "),
        partition=fill(Cut, parts["partition"], "[partition] "),
        objective=objective,
        schedule=_choice(parts["schedule"], "schedule", SCHEDULES, default),
        sync=_choice(parts["sync"], "sync", SYNCS, "every-step"),
        optimizer=_named(
            {k: v for k, v in parts["optimizer"].items() if k not in ours}, "optimizer"
        ),
        step=_step({k: v for k, v in parts["optimizer"].items() if k in ours}),
        rate=_choice(parts["lr"], "lr", RATES, "constant"),
        checkpoint=fill(Checkpoint, parts["checkpoint"], "[checkpoint] "),
        evaluate=fill(Evaluate, parts["evaluate"], "[evaluate] "),
        log=fill(Log, parts["log"], "[log] "),
    )
    check(run)
    return run


def _step(table: Table) -> Step:
    """Return what is clipped and scaled; a limit that limits nothing, or of nothing, is refused."""
    clip = fill(Step, table, "[optimizer] ")
    if not 0 <= clip.clip < math.inf:
        raise Refusal(
            f"[optimizer] clip = {clip.clip} is no norm: give a number above 0, or 0 for no limit"
        )
    if not clip.clip and "clip-over" in table:
        raise Refusal(
            f'[optimizer] clip-over = "{clip.clip_over}" without a clip: give clip, too, the '
            "largest norm, or leave clip-over out"
        )
    return clip


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
    for key in table:
        if "_" in key:
            raise Refusal(f"[{what}] {key}: keys are written with hyphens, as {kebab(key)}")
    return Choice(name, {snake(key): value for key, value in table.items() if key != "name"})


def _choice(table: Table, what: str, kinds: Mapping[str, type[Any]], default: str) -> Choice:
    """Return the choice a table makes among `kinds`, with all its fields spelled out."""
    choice = _named({"name": default} | table, what)
    made = make(kinds, choice.table(), what)
    return Choice(
        choice.name, {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.init}
    )


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
