"""Read a run file and check its tables."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.block.lr_schedule import LR_SCHEDULES
from dtrain.config.run import RunConfig
from dtrain.config.sections import (
    CheckpointSection,
    DataSection,
    EvaluateSection,
    LogSection,
    MeshSection,
    OptimizerSection,
    PartitionSection,
    RunSection,
    StrategyChoice,
)
from dtrain.config.validate import validate_run
from dtrain.errors import ConfigError, DtrainError
from dtrain.objectives import OBJECTIVES
from dtrain.schedules import SCHEDULES
from dtrain.schema import Table, build_strategy, from_table, kebab, load_toml, snake
from dtrain.syncs import SYNCS


def read_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply ``KEY=VALUE`` overrides and check everything that it says.

    Raises
    ------
    DtrainError
        The file is missing, is no TOML, or has an unknown key or name or an impossible value.
    """
    table = load_toml(path, "run file")
    for override in overrides:
        _override(table, override)
    try:
        return parse_run(table, path.resolve(), overrides)
    except DtrainError as refusal:
        raise refusal.with_prefix(str(path)) from refusal


def parse_run(table: Mapping[str, Any], path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Check the nested tables of a run file and return them as a `Run`."""
    tables = ["data", "model", "mesh", "partition", "objective", "schedule", "sync", "optimizer"]
    tables += ["lr", "checkpoint", "evaluate", "log"]
    plain = {key: value for key, value in table.items() if key not in tables}
    top = from_table(RunSection, plain, "", other_keys=tables)
    parts = {name: _subtable(table, name) for name in tables}
    if {"cuts", "balance"} <= parts["partition"].keys():
        raise ConfigError(
            "todo.key", "[partition] cuts say where every block starts: leave out balance"
        )
    common = [kebab(each.name) for each in dataclasses.fields(DataSection)]
    ours = [kebab(each.name) for each in dataclasses.fields(OptimizerSection)]
    objective = _choice(parts["objective"], "objective", OBJECTIVES, "mono-forward")
    default = build_strategy(OBJECTIVES, objective.to_table(), "objective").default_schedule
    run = RunConfig(
        path=path,
        overrides=tuple(overrides),
        settings=top,
        data=from_table(
            DataSection, {k: v for k, v in parts["data"].items() if k in common}, "[data] "
        ),
        dataset=_unchecked_choice(
            {k: v for k, v in parts["data"].items() if k not in common}, "data"
        ),
        model=_unchecked_choice(parts["model"], "model"),
        mesh=from_table(MeshSection, parts["mesh"], "[mesh] "),
        partition=from_table(PartitionSection, parts["partition"], "[partition] "),
        objective=objective,
        schedule=_choice(parts["schedule"], "schedule", SCHEDULES, default),
        sync=_choice(parts["sync"], "sync", SYNCS, "every-step"),
        optimizer=_unchecked_choice(
            {k: v for k, v in parts["optimizer"].items() if k not in ours}, "optimizer"
        ),
        optimizer_options=_optimizer_options(
            {k: v for k, v in parts["optimizer"].items() if k in ours}
        ),
        lr_schedule=_choice(parts["lr"], "lr", LR_SCHEDULES, "constant"),
        checkpoint=from_table(CheckpointSection, parts["checkpoint"], "[checkpoint] "),
        evaluate=from_table(EvaluateSection, parts["evaluate"], "[evaluate] "),
        log=from_table(LogSection, parts["log"], "[log] "),
    )
    validate_run(run)
    return run


def _optimizer_options(table: Table) -> OptimizerSection:
    """Return what is clipped and scaled; a limit that limits nothing, or of nothing, is refused."""
    clip = from_table(OptimizerSection, table, "[optimizer] ")
    if not 0 <= clip.clip < math.inf:
        raise ConfigError(
            "todo.key",
            f"[optimizer] clip = {clip.clip} is no norm: give a number above 0, or 0 for no limit",
        )
    if not clip.clip and "clip-over" in table:
        raise ConfigError(
            "todo.key",
            f'[optimizer] clip-over = "{clip.clip_over}" without a clip: give clip, too, the '
            "largest norm, or leave clip-over out",
        )
    return clip


def _subtable(table: Mapping[str, Any], name: str) -> Table:
    part = table.get(name, {})
    if not isinstance(part, dict):
        raise ConfigError(
            "todo.key", f'{name} is a table: write [{name}] and name = "{part}" under it'
        )
    return part


def _unchecked_choice(table: Table, section: str) -> StrategyChoice:
    """Return the choice a table makes; which names and fields are legal is found out later."""
    name = table.get("name")
    if not isinstance(name, str):
        raise ConfigError("todo.key", f'[{section}] needs name = "..."')
    for key in table:
        if "_" in key:
            raise ConfigError(
                "todo.key", f"[{section}] {key}: keys are written with hyphens, as {kebab(key)}"
            )
    return StrategyChoice(
        name, {snake(key): value for key, value in table.items() if key != "name"}
    )


def _choice(
    table: Table, section: str, kinds: Mapping[str, type[Any]], default: str
) -> StrategyChoice:
    """Return the choice a table makes among `kinds`, with all its fields spelled out."""
    choice = _unchecked_choice({"name": default} | table, section)
    made = build_strategy(kinds, choice.to_table(), section)
    return StrategyChoice(
        choice.name, {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.init}
    )


def _override(table: Table, override: str) -> None:
    """Apply one ``KEY=VALUE`` to the nested tables; a value that is no TOML is a text."""
    path, equals, value = override.partition("=")
    *outer, key = path.strip().split(".")
    if not equals or not key:
        raise ConfigError(
            "todo.key", f"--set {override}: write KEY=VALUE, as in --set optimizer.lr=0.01"
        )
    for name in outer:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError("todo.key", f"--set {override}: '{name}' is not a table")
    try:
        table[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = value
