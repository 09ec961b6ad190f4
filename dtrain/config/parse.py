"""Read a run file and check its tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.config.overrides import override_key
from dtrain.config.renamed_keys import refuse_old_keys, translate_old_keys
from dtrain.config.run import RUN_FILE_HEADER, RunConfig
from dtrain.config.sections import (
    Checkpoint,
    DataSection,
    Ema,
    Evaluate,
    Log,
    Mesh,
    ModelSection,
    Numerics,
    OptimizerSection,
    Partition,
    RunSection,
    Stop,
    StrategyChoice,
    Timeouts,
)
from dtrain.config.strategies import read_strategy
from dtrain.config.sweep import SWEEP, refuse_sweep
from dtrain.config.validate import validate_run
from dtrain.errors import ConfigError, DtrainError
from dtrain.schema import Table, from_table, kebab, load_toml, snake, strategy_name
from dtrain.tasks.task import Task
from dtrain.user_code import GivenArray, register_arrays, register_object, registered_object

SECTIONS = (
    *("data", "task", "model", "mesh", "partition", "objective", "schedule", "sync"),
    *("optimizer", "lr", "checkpoint", "evaluate", "log", "stop", "ema", "timeouts", "numerics"),
)
"""The tables of a run file."""


def read_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply ``KEY=VALUE`` overrides and check every key.

    Raises
    ------
    ConfigError
        The file is missing or is no TOML, a key or a name is unknown, or a value is impossible.
    """
    table = load_toml(path, "run file")
    return _parse_with_overrides(table, overrides, path.resolve(), path)


def read_resolved_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the `run.toml` of a run folder; return the run, with the path of its own run file.

    An earlier version may have written it: old keys are translated.

    Raises
    ------
    ConfigError
        As `read_run`, or its first line does not name the run file.
    """
    table = translate_old_keys(load_toml(path, "run file"))
    return _parse_with_overrides(table, overrides, _source_path(path), path)


def _source_path(path: Path) -> Path:
    """Return the run file that a resolved one comes from."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    head, tail = RUN_FILE_HEADER.split("{}")
    if not (line.startswith(head) and line.endswith(tail)):
        raise ConfigError(
            "run-folder.no-source-path",
            f"the first line of {path} must say where relative paths and imports start: write "
            f"'{RUN_FILE_HEADER.format('/the/path/of/the/run/file.toml')}'",
        )
    return Path(line.removeprefix(head).removesuffix(tail))


def _parse_with_overrides(
    table: Table, overrides: Sequence[str], source: Path, path: Path
) -> RunConfig:
    """Apply overrides to a run file's tables and parse them; errors begin with `path`."""
    for override in overrides:
        override_key(table, override)
    try:
        refuse_sweep(table.pop(SWEEP, {}), overrides)
        return parse_run(table, source, overrides)
    except DtrainError as error:
        raise error.with_prefix(str(path)) from error


def parse_run(table: Mapping[str, Any], path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run that the nested tables of a run file describe, once they are checked.

    Parameters
    ----------
    path : Path
        The run file; its folder is first on the import path.

    Raises
    ------
    ConfigError
        A key or a name is unknown, or a value is impossible.
    """
    refuse_old_keys(dict(table))
    settings = {key: value for key, value in table.items() if key not in SECTIONS}
    sections = {name: _section(table, name) for name in SECTIONS}
    _refuse_pairs(sections)
    data_keys, dataset = _split_keys(sections["data"], DataSection)
    if not isinstance(data_keys.get("sampler", ""), str) and not callable(data_keys["sampler"]):
        data_keys["sampler"] = GivenArray(data_keys["sampler"])
    model_keys, model = _split_keys(sections["model"], ModelSection)
    rest = _take_rest(sections["optimizer"])
    optimizer_keys, optimizer = _split_keys(sections["optimizer"], OptimizerSection)
    defaults = {"objective": "mono-forward", "sync": "every-step", "lr": "constant"}
    strategies = {
        section: read_strategy(section, {"name": name} | sections[section], path.parent)
        for section, name in defaults.items()
    }
    objective = strategies["objective"]
    schedule = {"name": objective.instance.default_schedule} | sections["schedule"]
    run = RunConfig(
        path=path,
        overrides=tuple(overrides),
        settings=from_table(RunSection, settings, "", other_keys=(*SECTIONS, SWEEP)),
        data=from_table(DataSection, data_keys, "[data] "),
        dataset=_choice(dataset, "data"),
        model=_choice(model, "model"),
        model_options=from_table(ModelSection, model_keys, "[model] "),
        mesh=from_table(Mesh, sections["mesh"], "[mesh] "),
        partition=from_table(Partition, sections["partition"], "[partition] "),
        objective=objective,
        schedule=read_strategy("schedule", schedule, path.parent),
        sync=strategies["sync"],
        optimizer=_choice(optimizer, "optimizer"),
        optimizer_options=_optimizer_options(optimizer_keys),
        lr_schedule=strategies["lr"],
        checkpoint=from_table(Checkpoint, sections["checkpoint"], "[checkpoint] "),
        evaluate=from_table(Evaluate, sections["evaluate"], "[evaluate] "),
        log=from_table(Log, sections["log"], "[log] "),
        task=_task(sections["task"], path.parent),
        optimizer_rest=rest,
        stop=from_table(Stop, sections["stop"], "[stop] ") if "stop" in table else None,
        ema=from_table(Ema, sections["ema"], "[ema] ") if "ema" in table else None,
        numerics=from_table(Numerics, sections["numerics"], "[numerics] "),
        timeouts=from_table(Timeouts, sections["timeouts"], "[timeouts] "),
    )
    validate_run(run)
    return run


def _refuse_pairs(sections: Mapping[str, Table]) -> None:
    """Refuse keys that exclude each other, one of which has a default."""
    if {"cuts", "balance"} <= sections["partition"].keys():
        raise ConfigError(
            "partition.cuts-exclude-balance",
            "[partition] cuts already say where every block starts: leave out balance",
        )
    if {"every", "every-updates"} <= sections["evaluate"].keys():
        raise ConfigError(
            "evaluate.two-intervals",
            "[evaluate] every counts epochs and every-updates counts updates: leave out one",
        )


def _section(table: Mapping[str, Any], name: str) -> Table:
    """Return the table of a section, empty where the run file has none."""
    section = table.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(
            "run-file.no-table",
            f'{name} is a table: write [{name}] and name = "{section}" under it',
        )
    return dict(section)


def _take_rest(optimizer: Table) -> StrategyChoice | None:
    """Remove ``[optimizer.rest]`` from the table of the optimizer and return its choice."""
    rest = optimizer.pop("rest", None)
    if rest is not None and not isinstance(rest, dict):
        raise ConfigError(
            "run-file.no-table",
            f'optimizer.rest is a table: write [optimizer.rest] and name = "{rest}" under it',
        )
    return None if rest is None else _choice(rest, "optimizer.rest")


def _split_keys(table: Table, kind: type) -> tuple[Table, Table]:
    """Return the part of a table that is of the fields of `kind`, and the rest."""
    keys = {kebab(field.name) for field in dataclasses.fields(kind)}
    inside = {key: value for key, value in table.items() if key in keys}
    return inside, {key: value for key, value in table.items() if key not in keys}


def _refuse_underscores(table: Table, section: str) -> None:
    for key in table:
        if "_" in key:
            raise ConfigError(
                "run-file.underscore",
                f"[{section}] {key}: keys are written with hyphens, as {kebab(key)}",
            )


def _choice(table: Table, section: str) -> StrategyChoice:
    """Return the name and the fields that a table gives; they are checked when it is made.

    A run that is made in Python may have the object itself as the name.
    """
    _refuse_underscores(table, section)
    own_keys = ("name", "fingerprint")
    fields = {snake(key): value for key, value in table.items() if key not in own_keys}
    target = table.get("name")
    if target is None or isinstance(target, str):
        name, fingerprint = strategy_name(table, section), table.get("fingerprint", "")
        return StrategyChoice(name, fields, registered_object(name, fingerprint), fingerprint)
    if section == "data" and not callable(target):
        return StrategyChoice(register_arrays(target), fields, target)
    name, fingerprint = register_object(target)
    return StrategyChoice(name, fields, target, fingerprint)


def _task(table: Table, folder: Path) -> Task:
    """Return the task of a run file's table, or the one that was made in Python."""
    if isinstance(table.get("name"), Task):
        return table["name"]  # type: ignore[no-any-return]
    _refuse_underscores(table, "task")
    return Task.from_table(table, folder)


def _optimizer_options(table: Table) -> OptimizerSection:
    """Return the keys of clipping and scaling; refuse a limit that is no number, or is missing."""
    options = from_table(OptimizerSection, table, "[optimizer] ")
    if not 0 <= options.clip < math.inf:
        raise ConfigError(
            "optimizer.clip-out-of-range",
            f"[optimizer] clip = {options.clip} must be finite and at least 0 (0: no limit)",
        )
    if not options.clip and "clip-over" in table:
        raise ConfigError(
            "optimizer.clip-over-without-clip",
            f'[optimizer] clip-over = "{options.clip_over}" has no effect without clip: set clip '
            "to the largest norm, or leave out clip-over",
        )
    return options
