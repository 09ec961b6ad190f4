"""Strategies of a run: objective, schedule, sync and learning-rate schedule, each with its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dtrain.block.lr_schedule import LR_SCHEDULES, FunctionLR, LRSchedule
from dtrain.errors import ConfigError
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.base import Objective
from dtrain.schedules import SCHEDULES
from dtrain.schedules.base import Schedule
from dtrain.schema import (
    Table,
    as_dataclass,
    build_strategy,
    canonical_name,
    from_table,
    strategy_name,
    to_table,
)
from dtrain.syncs import SYNCS
from dtrain.syncs.base import Sync
from dtrain.user_code import (
    import_object,
    register_object,
    registered_object,
    require_object,
)

T = TypeVar("T")


BASES: dict[str, type] = {
    "objective": Objective,
    "schedule": Schedule,
    "sync": Sync,
    "lr": LRSchedule,
}
"""The base class of the strategies of each section."""


BUILT_IN: dict[str, Mapping[str, type[Any]]] = {
    "objective": OBJECTIVES,
    "schedule": SCHEDULES,
    "sync": SYNCS,
    "lr": LR_SCHEDULES,
}
"""The strategies that a run file names by one word, by section."""


@dataclass(frozen=True)
class NamedStrategy(Generic[T]):
    """A strategy and the name that run files and records give it.

    Attributes
    ----------
    name : str
        A key of `BUILT_IN`, or "module:Class" for a user's class.
    instance : object
        The strategy. A sync in a `RunConfig` is the prototype of those of the blocks.
    fingerprint : str
        Identifies a class that its name does not.
    """

    name: str
    instance: T
    fingerprint: str = ""

    def to_table(self) -> Table:
        """Return the table of a run file that makes this strategy, defaults included."""
        fingerprint = {"fingerprint": self.fingerprint} if self.fingerprint else {}
        return {"name": self.name} | to_table(self.instance) | fingerprint


def read_strategy(section: str, table: Table, folder: Path) -> NamedStrategy[Any]:
    """Return the strategy that a run file's table names, by one word or as "module:Class".

    Parameters
    ----------
    section : str
        A key of `BASES`.
    folder : Path
        The run file's folder; it is first on the import path.

    A run that is made in Python may have a class or an instance as the name.

    Raises
    ------
    ConfigError
        The name or a key is unknown, a value does not fit its field, or the class is not derived
        from the section's base class.
    """
    table = dict(table)
    target = table.get("name")
    if isinstance(target, BASES[section]):
        return name_strategy(section, target)
    fingerprint = str(table.pop("fingerprint", ""))
    if section == "lr" and callable(target) and not isinstance(target, type):
        name, fingerprint = register_object(target)
        table = table | {"name": name}
    elif isinstance(target, type):
        target = _as_strategy(section, target.__qualname__, target)
        name, fingerprint = register_object(target)
        table = table | {"name": name}
    else:
        name = strategy_name(table, section)
        target = registered_object(name, fingerprint)
        require_object(target, name, fingerprint, section)
    strategies = BUILT_IN[section]
    if target is None and ":" in name:
        target = import_object(name, folder, section)
        if section != "lr" or isinstance(target, type):
            target = _as_strategy(section, name, target)
    if target is not None and not isinstance(target, type):
        return _rates_of_function(name, target, table, fingerprint)
    if target is not None:
        strategies = {name: target}
    table = _with_canonical_names(table, strategies)
    strategy = build_strategy(strategies, table, section)
    return NamedStrategy(table["name"], strategy, fingerprint)


def name_strategy(section: str, instance: T) -> NamedStrategy[T]:
    """Return a strategy that was made in Python with the name that a run file gives it."""
    if section == "lr" and callable(instance) and not isinstance(instance, LRSchedule):
        name, fingerprint = register_object(instance)
        return _rates_of_function(name, instance, {}, fingerprint)
    names = [name for name, kind in BUILT_IN[section].items() if kind is type(instance)]
    if names:
        return NamedStrategy(names[0], instance)
    name, fingerprint = register_object(as_dataclass(type(instance)))
    return NamedStrategy(name, instance, fingerprint)


def _rates_of_function(
    name: str, function: Any, table: Mapping[str, Any], fingerprint: str
) -> NamedStrategy[Any]:
    """Return the learning-rate schedule of a user's function; the table may have a warm-up."""
    keys = {key: value for key, value in table.items() if key != "name"}
    schedule = FunctionLR.of(function, from_table(FunctionLR, keys, "[lr] ").warmup_updates)
    return NamedStrategy(name, schedule, fingerprint)


def _with_canonical_names(table: Table, legal_names: Iterable[str]) -> Table:
    """Return a strategy's table without synonyms, those of inner strategies included."""
    canonical = dict(table)
    if isinstance(table.get("name"), str):
        canonical["name"] = canonical_name(table["name"], legal_names)
    if isinstance(table.get("inner"), dict):
        canonical["inner"] = _with_canonical_names(table["inner"], legal_names)
    return canonical


def _as_strategy(section: str, name: str, kind: object) -> type[Any]:
    """Check that a user's class is a strategy of the section."""
    base = BASES[section]
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigError(
            "user-code.no-strategy",
            f"[{section}] '{name}' is not derived from {base.__module__}.{base.__name__}: "
            "derive it",
        )
    return as_dataclass(kind)
