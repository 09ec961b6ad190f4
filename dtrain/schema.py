"""TOML tables to dataclasses and back: kebab-case keys in the file, snake_case fields in the code.

Invariant: the dataclass declares the names, types and defaults of a table. Everything else is
refused, and the error lists what is legal.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from dtrain.errors import ConfigError, unknown_name

Table = dict[str, Any]


T = TypeVar("T")


SYNONYMS = {
    "gpipe": "fill-drain",
    "all-reduce": "every-step",
    "none": "never",
    "lwp-v": "velocity",
    "lwp-w": "difference",
}
"""Other names of the field for strategies and for values of their keys.

A synonym is legal wherever the name beside it is; records and `run.toml` have that name.
"""


TOML_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
"""Types of single values, with their descriptions."""


def canonical_name(name: str, legal_names: Iterable[str]) -> str:
    """Return the legal name that `name` is a synonym of, else `name` itself."""
    legal_names = set(legal_names)
    canonical = SYNONYMS.get(name, name)
    return canonical if name not in legal_names and canonical in legal_names else name


def with_synonyms(legal_names: Iterable[str]) -> list[str]:
    """Return the legal names and all their synonyms."""
    legal_names = list(legal_names)
    return legal_names + [name for name, other in SYNONYMS.items() if other in legal_names]


class Strategy:
    """Base class of strategies: objectives, schedules, syncs and learning-rate schedules.

    A subclass needs no decorator: it is a dataclass from its first instance on, so its annotations
    are its fields. An explicit ``@dataclass`` is respected; it is applied after the class exists,
    therefore the class is not changed before it is used.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> typing.Self:
        as_dataclass(cls)
        return super().__new__(cls)


def as_dataclass(kind: type[T]) -> type[T]:
    """Make a class a dataclass, if its author did not, so that its annotations are fields.

    It is frozen, and compares fields, where the dataclass that it derives from does. A class
    without annotations keeps the `__init__` that it inherits. Annotations of base classes between
    it and that dataclass are fields, too. A class without any field stays as it is, so that a
    subclass may be frozen or not.
    """
    if "__dataclass_fields__" in vars(kind):
        return kind
    parameters = getattr(kind, "__dataclass_params__", None)
    inherited = _undeclared_annotations(kind)
    if parameters is None and not inherited and not _own_fields(kind):
        return kind
    if inherited:
        kind.__annotations__ = inherited | inspect.get_annotations(kind)
    has_init = kind.__init__ is not object.__init__
    return dataclasses.dataclass(
        kind,
        init=bool(inspect.get_annotations(kind)) or not has_init,
        frozen=parameters is not None and parameters.frozen,
        eq=parameters is not None and parameters.eq,
    )


def _undeclared_annotations(kind: type) -> dict[str, Any]:
    """Return the fields that base classes annotate which are no dataclasses, first bases first."""
    annotations: dict[str, Any] = {}
    for base in reversed(kind.__mro__[1:]):
        if "__dataclass_fields__" not in vars(base):
            annotations |= _own_fields(base)
    return annotations


def _own_fields(kind: type) -> dict[str, Any]:
    """Return the annotations of a class itself that are no class variables."""
    own = inspect.get_annotations(kind)
    hints = typing.get_type_hints(kind) if own else {}
    return {
        name: hints[name]
        for name in own
        if typing.get_origin(hints[name]) is not typing.ClassVar
        and hints[name] is not typing.ClassVar
    }


def load_toml(path: Path, description: str) -> Table:
    """Return the nested tables of a TOML file; errors name it by its `description`.

    Raises
    ------
    ConfigError
        The file cannot be read, or is not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "toml.unreadable", f"cannot read the {description} {path}: {error.strerror}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError("toml.invalid", f"{path} is not valid TOML: {error}") from error


def strategy_name(table: Mapping[str, Any], section: str) -> str:
    """Return the name that the table of a section gives.

    Raises
    ------
    ConfigError
        The table has no name, or one that is no text.
    """
    name = table.get("name")
    if not isinstance(name, str):
        raise ConfigError("run-file.name-missing", f'[{section}] needs name = "..."')
    return name


def build_strategy(strategies: Mapping[str, type[T]], table: Mapping[str, Any], section: str) -> T:
    """Return an instance of the strategy that a table names; its other keys are its fields.

    Raises
    ------
    ConfigError
        The name or a key is unknown, or a value does not fit its field.
    """
    name = canonical_name(strategy_name(table, section), strategies)
    if name not in strategies:
        area = section.partition(".")[0]
        raise unknown_name(section, name, with_synonyms(strategies), key=f"{area}.unknown")
    fields = {key: value for key, value in table.items() if key != "name"}
    return from_table(strategies[name], fields, f"[{section}] ")


def from_table(
    kind: type[T], table: Mapping[str, Any], location: str, other_keys: Sequence[str] = ()
) -> T:
    """Return an instance of the dataclass `kind`, made of a kebab-case table.

    Parameters
    ----------
    location : str
        The table's name in errors, as in "[mesh] ".
    other_keys : sequence of str
        Keys that are legal in the file and are read elsewhere; an unknown key's error lists them.

    Raises
    ------
    ConfigError
        A key is unknown or missing, or a value does not fit its field.
    """
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    fields_by_key = {kebab(field.name): field for field in fields if field.init}
    values = {}
    for key, value in table.items():
        if key not in fields_by_key:
            raise unknown_key(location, key, [*fields_by_key, *other_keys])
        values[snake(key)] = convert(value, hints[snake(key)], f"{location}{key}")
    for key, field in fields_by_key.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and key not in table:
            raise ConfigError("run-file.key-missing", f"{location}{key} is missing: add it")
    return kind(**values)


def unknown_key(location: str, key: str, legal_keys: Iterable[str]) -> ConfigError:
    """Return the error for a key that a table does not have."""
    return unknown_name(f"key {location}".strip(), key, legal_keys, key="run-file.unknown-key")


def convert(value: Any, hint: Any, location: str) -> Any:
    """Return a TOML `value` as the annotated type `hint`.

    Raises
    ------
    ConfigError
        The value is of another type, or not one of the literals.
    """
    options = _union_members(hint)
    for option in options:
        matches, converted = _match_type(value, option, location)
        if matches:
            return converted
    if is_quoted_number(value) and {int, float}.intersection(options):
        raise ConfigError(
            "run-file.quoted-number", f'{location} = "{value}" is a text: drop the quotes'
        )
    legal = " or ".join(
        dict.fromkeys(_type_text(option) for option in options if _is_toml_type(option))
    )
    raise ConfigError(
        "run-file.wrong-type", f"{location} = {toml_text(value)} does not fit: give {legal}"
    )


def is_quoted_number(value: object) -> bool:
    """Return whether a value is a text that reads as a number."""
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _union_members(hint: Any) -> list[Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [option for part in typing.get_args(hint) for option in _union_members(part)]
    return [] if hint is type(None) else [hint]


def _match_type(value: Any, hint: Any, location: str) -> tuple[bool, Any]:
    """Return whether `value` is of type `hint`, and the value in that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        literal = canonical_name(value, arguments) if isinstance(value, str) else None
        return literal in arguments, literal
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False, None
        items = enumerate(value)
        return True, tuple(convert(item, arguments[0], f"{location}[{i}]") for i, item in items)
    if origin is dict:
        return isinstance(value, dict), value
    if origin is collections.abc.Callable:  # in Python alone
        return callable(value), value
    if hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number, float(value) if is_number else None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, hint), value


def _type_text(hint: Any) -> str:
    """Describe the values of a type; empty for one that no run file has."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{literal}"' for literal in with_synonyms(arguments))
    if origin is dict:
        return "a table"
    if origin is tuple:
        options = _union_members(arguments[0])
        items = " or ".join(_type_text(option) for option in options if _is_toml_type(option))
        return f"a list, each {items}"
    return TOML_TYPES[hint]


def _is_toml_type(hint: Any) -> bool:
    """Return whether a TOML file can hold values of a type; an object it cannot."""
    origin = typing.get_origin(hint)
    return hint in TOML_TYPES or (origin is not None and origin is not collections.abc.Callable)


def kebab(name: str) -> str:
    """Return a field's name as a run file's key."""
    return name.replace("_", "-")


def snake(key: str) -> str:
    """Return a run file's key as a field's name."""
    return key.replace("-", "_")


def to_table(instance: Any) -> Table:
    """Return a dataclass as a kebab-case table, without the fields that are None."""
    fields = dataclasses.fields(instance) if dataclasses.is_dataclass(instance) else ()
    names = [field.name for field in fields if field.init]
    values = {kebab(name): getattr(instance, name) for name in names}
    return {key: value for key, value in values.items() if value is not None}


def toml_text(value: Any) -> str:
    """Return a plain value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_text(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def flatten_table(table: Table, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the nested tables as dotted keys and values; a tuple becomes a list."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten_table(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def dump_toml(table: Table) -> str:
    """Return nested tables as the text of a run file."""
    top_keys = [
        f"{key} = {toml_text(value)}" for key, value in table.items() if type(value) is not dict
    ]
    sections = ["\n".join(top_keys)]
    for name, part in table.items():
        if type(part) is dict:
            rows = [f"{key} = {toml_text(value)}" for key, value in part.items()]
            sections.append("\n".join([f"[{name}]", *rows]))
    return "\n\n".join(sections) + "\n"
