"""Strategies of a run: objective, schedule, sync and learning-rate schedule, each with its name."""

from __future__ import annotations

import dataclasses
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
    build_strategy,
    canonical_name,
    from_table,
    strategy_name,
    to_table,
)
from dtrain.syncs import SYNCS
from dtrain.syncs.base import Sync
from dtrain.user_code import import_object, object_name

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
    """

    name: str
    instance: T

    def to_table(self) -> Table:
        """Return the table of a run file that makes this strategy, defaults included."""
        return {"name": self.name} | to_table(self.instance)


def read_strategy(section: str, table: Table, folder: Path) -> NamedStrategy[Any]:
    """Return the strategy that a run file's table names, by one word or as "module:Class".

    Parameters
    ----------
    section : str
        A key of `BASES`.
    folder : Path
        The run file's folder; it is first on the import path.

    Raises
    ------
    ConfigError
        The name or a key is unknown, a value does not fit its field, or the class is not derived
        from the section's base class.
    """
    strategies, name = BUILT_IN[section], strategy_name(table, section)
    if ":" in name and section == "lr":
        function = import_object(name, folder, section)
        if callable(function) and not isinstance(function, type):
            keys = from_table(FunctionLR, {k: v for k, v in table.items() if k != "name"}, "[lr] ")
            return NamedStrategy(name, FunctionLR.of(function, keys.warmup_updates))
    if ":" in name:
        strategies = {name: _import_strategy(section, name, folder)}
    table = _with_canonical_names(table, strategies)
    return NamedStrategy(table["name"], build_strategy(strategies, table, section))


def name_strategy(section: str, instance: T) -> NamedStrategy[T]:
    """Return a strategy that was made in Python with the name that a run file gives it."""
    if section == "lr" and callable(instance) and not isinstance(instance, LRSchedule):
        return NamedStrategy(object_name(instance), FunctionLR.of(instance))  # type: ignore[arg-type]
    names = [name for name, kind in BUILT_IN[section].items() if kind is type(instance)]
    kind = _as_dataclass(type(instance))
    return NamedStrategy(names[0] if names else object_name(kind), instance)


def _with_canonical_names(table: Table, legal_names: Iterable[str]) -> Table:
    """Return a strategy's table without synonyms, those of inner strategies included."""
    canonical = dict(table)
    if isinstance(table.get("name"), str):
        canonical["name"] = canonical_name(table["name"], legal_names)
    if isinstance(table.get("inner"), dict):
        canonical["inner"] = _with_canonical_names(table["inner"], legal_names)
    return canonical


def _import_strategy(section: str, name: str, folder: Path) -> type[Any]:
    """Import a user's class and check that it is a strategy of the section."""
    kind, base = import_object(name, folder, section), BASES[section]
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigError(
            "user-code.no-strategy",
            f"[{section}] '{name}' is not derived from {base.__module__}.{base.__name__}: "
            "derive it",
        )
    return _as_dataclass(kind)


def _as_dataclass(kind: type[T]) -> type[T]:
    """Make a class a dataclass, if its author did not, so that its annotations are fields.

    A class without annotations keeps the `__init__` that it inherits.
    """
    if "__dataclass_fields__" in vars(kind):
        return kind
    parameters = getattr(kind, "__dataclass_params__", None)
    frozen = parameters is not None and parameters.frozen
    init = "__annotations__" in vars(kind)
    return dataclasses.dataclass(kind, init=init, frozen=frozen, eq=frozen)
