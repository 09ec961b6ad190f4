"""``KEY=VALUE``: one key of a run file, set from the command line."""

from __future__ import annotations

import tomllib
from typing import Any

from dtrain.errors import ConfigError
from dtrain.schema import Table


def override_key(table: Table, override: str) -> None:
    """Apply one ``KEY=VALUE`` to the nested tables; a value that is no TOML is a text."""
    path, equals, _ = override.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not key:
        raise ConfigError(
            "override.malformed",
            f"--set {override}: write KEY=VALUE, as in --set optimizer.lr=0.01",
        )
    for name in sections:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(
                "override.no-table",
                f"--set {override}: '{name}' is not a table: name a key of a table",
            )
    table[key] = override_value(override)


def override_name(override: str) -> str:
    """Return the dotted key of one ``KEY=VALUE``."""
    return override.partition("=")[0].strip()


def override_value(override: str) -> Any:
    """Return the value of one ``KEY=VALUE``."""
    text = override.partition("=")[2]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
