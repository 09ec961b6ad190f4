"""Strategies of a run: objective, schedule, sync and learning-rate schedule, each with its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dtrain.block.lr_schedule import LR_SCHEDULES, LRSchedule
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
    strategy_name,
    to_table,
)
from dtrain.syncs import SYNCS
from dtrain.syncs.base import Sync
from dtrain.user_code import fingerprint, import_object, is_importable, object_name

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
        """Return the table of a run file that makes this strategy, defaults included.

        A class that no run file can name has the key `fingerprint`, which another class of the same
        name does not have.
        """
        table, kind = {"name": self.name} | to_table(self.instance), type(self.instance)
        if ":" in self.name and not is_importable(kind):
            table["fingerprint"] = fingerprint(kind)
        return table


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
    if ":" in name:
        strategies = {name: _import_strategy(section, name, folder)}
    table = _with_canonical_names(table, strategies)
    return NamedStrategy(table["name"], build_strategy(strategies, table, section))


def name_strategy(section: str, instance: T) -> NamedStrategy[T]:
    """Return a strategy that was made in Python with the name that a run file gives it."""
    names = [name for name, kind in BUILT_IN[section].items() if kind is type(instance)]
    return NamedStrategy(names[0] if names else object_name(type(instance)), instance)


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
    return as_dataclass(kind)
