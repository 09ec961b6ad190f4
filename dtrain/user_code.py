"""User code by name: `"package.module:function"`, found beside the run file first.

Invariant: what is not there is a refusal that says where it was looked for; what raises while
being imported is the user's own error and keeps its traceback.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain.errors import ConfigError, unknown_name
from dtrain.schema import kebab

PATTERN = "package.module:function"


def import_object(target: str, folder: Path, kind: str) -> Callable[..., Any]:
    """Return the function that `target` names, importing its module.

    The folder stays first on the import path, since user functions may import later too.

    Parameters
    ----------
    target : str
        `"package.module:function"`.
    folder : Path
        The run file's folder.
    what : str
        What is looked for ("model", "data"), for the messages.

    Raises
    ------
    DtrainError
        A malformed target, a missing module or function, or something that cannot be called.
    """
    name, _, function = target.partition(":")
    if not all(part.isidentifier() for part in [*name.split("."), function]):
        raise ConfigError("todo.key", f"{kind} '{target}' is not of the form '{PATTERN}'")
    module = _import_module(name, folder.resolve(), f"{kind} '{target}'")
    found = getattr(module, function, None)
    if not callable(found):
        where = getattr(module, "__file__", None) or "a built-in module"
        raise ConfigError(
            "todo.key", f"{kind} '{target}': {where} has no function called '{function}'"
        )
    return found  # type: ignore[no-any-return]


def _import_module(name: str, folder: Path, description: str) -> ModuleType:
    """Import a module with `folder` first on the import path."""
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the module asked for, or a package on the way to it: another missing module is a
        # mistake inside the user's code.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            "todo.key",
            f"{description}: there is no module '{name}', neither in {folder} (the run file's folder) "
            f"nor on Python's path",
        ) from error


def bind_arguments(
    section: str,
    function: Callable[..., Any],
    fields: Mapping[str, object],
    context: Mapping[str, object] | None = None,
    common_keys: Iterable[str] = (),
) -> dict[str, Any]:
    """Return keyword arguments for `function`: all fields, and of what is offered what it takes.

    Parameters
    ----------
    table : str
        The run file's table, for the messages, as in "[model]".
    fields : mapping
        Keys of that table in snake_case; lists become tuples.
    offered : mapping, optional
        What the program knows (shape, classes); a run file may not set these.
    common : iterable of str
        Keys of the table that were taken out before; named where a key is unknown.

    Raises
    ------
    DtrainError
        A field that the signature does not take, or a required one that is missing.
    """
    context = context or {}
    taken = inspect.signature(function).parameters
    free = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    named = [
        each for each in taken.values() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    legal = [each.name for each in named if each.name not in context]
    for key in fields:
        if key in context or not (free or key in legal):
            raise unknown_name(f"key in {section}", kebab(key), [*map(kebab, legal), *common_keys])
    needed = [each.name for each in named if each.default is each.empty]
    missing = [key for key in needed if key not in fields and key not in context]
    if missing:
        raise ConfigError(
            "todo.key", f"{section} lacks {', '.join(map(kebab, missing))}: add it to the run file"
        )
    given = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return given | {key: value for key, value in context.items() if free or key in taken}
