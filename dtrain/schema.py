"""TOML tables to dataclasses and back: keys in kebab-case there, fields in snake_case here.

Invariant: what a table may hold is what the dataclass declares, names, types and defaults alike;
everything else is a refusal that says what is legal.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from dtrain.errors import ConfigError, unknown_name

Table = dict[str, Any]


T = TypeVar("T")


def load_toml(path: Path, description: str) -> Table:
    """Return the nested tables of a TOML file; `what` it is says the refusal where there is none.

    Raises
    ------
    DtrainError
        The file cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "todo.key", f"cannot read the {description} {path}: {error.strerror}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("todo.key", f"{path} is not valid TOML: {error}") from error


def build_strategy(strategies: Mapping[str, type[T]], table: Mapping[str, Any], section: str) -> T:
    """Return the strategy of `kinds` that a table names, its fields checked against its own.

    Raises
    ------
    DtrainError
        For a name or a key that there is not, or a value that does not fit.
    """
    name = table.get("name")
    if not isinstance(name, str):
        raise ConfigError("todo.key", f'[{section}] needs name = "..."')
    if name not in strategies:
        raise unknown_name(section, name, strategies)
    rest = {key: value for key, value in table.items() if key != "name"}
    return from_table(strategies[name], rest, f"[{section}] ")


def from_table(
    kind: type[T], table: Mapping[str, Any], location: str, other_keys: Sequence[str] = ()
) -> T:
    """Return the dataclass `kind` made of a kebab-case table; unknown keys are refused."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    names = {kebab(each.name): each for each in fields if each.init}
    values = {}
    for key, value in table.items():
        if key not in names:
            raise unknown_name(f"key {location}".strip(), key, [*names, *other_keys])
        values[snake(key)] = convert(value, hints[snake(key)], f"{location}{key}")
    for key, each in names.items():
        lacking = each.default is dataclasses.MISSING
        if lacking and each.default_factory is dataclasses.MISSING and key not in table:
            raise ConfigError("todo.key", f"{location}{key} is missing")
    return kind(**values)


def convert(value: Any, hint: Any, location: str) -> Any:
    """Return a TOML `value` as the annotated type `hint`, or refuse it."""
    options = _union_members(hint)
    for option in options:
        done, result = _match_type(value, option, location)
        if done:
            return result
    wanted = " or ".join(dict.fromkeys(_type_text(option) for option in options))
    raise ConfigError("todo.key", f"{location} = {toml_text(value)} does not fit: give {wanted}")


def _union_members(hint: Any) -> list[Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [option for part in typing.get_args(hint) for option in _union_members(part)]
    return [] if hint is type(None) else [hint]


def _match_type(value: Any, hint: Any, location: str) -> tuple[bool, Any]:
    """Return whether `value` is of type `hint`, and the value in that type."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint) and isinstance(value, str), value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False, None
        inner = typing.get_args(hint)[0]
        return True, tuple(convert(each, inner, f"{location}[{i}]") for i, each in enumerate(value))
    if origin is dict:
        return isinstance(value, dict), value
    if hint is float:
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        return plain, float(value) if plain else None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, hint), value


def _type_text(hint: Any) -> str:
    """Say in words what a type allows."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(f'"{each}"' for each in typing.get_args(hint))
    if origin is dict:
        return "a table"
    if origin is tuple:
        return f"a list, each {' or '.join(_type_text(o) for o in _union_members(typing.get_args(hint)[0]))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]


def kebab(name: str) -> str:
    """Return a field's name as a run file's key."""
    return name.replace("_", "-")


def snake(key: str) -> str:
    """Return a run file's key as a field's name."""
    return key.replace("-", "_")


def to_table(instance: Any) -> Table:
    """Return a dataclass as a kebab-case table, without the fields that are None."""
    pairs = ((each.name, getattr(instance, each.name)) for each in dataclasses.fields(instance))
    return {kebab(name): value for name, value in pairs if value is not None}


def toml_text(value: Any) -> str:
    """Return a plain value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_text(each) for each in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_text(each)}" for key, each in value.items()) + "}"
    return str(value)


def dump_toml(table: Table) -> str:
    """Return nested tables as the text of a run file."""
    plain = [
        f"{key} = {toml_text(value)}" for key, value in table.items() if type(value) is not dict
    ]
    lines = ["\n".join(plain)]
    for name, part in table.items():
        if type(part) is dict:
            rows = [f"{key} = {toml_text(value)}" for key, value in part.items()]
            lines.append("\n".join([f"[{name}]", *rows]))
    return "\n\n".join(lines) + "\n"
