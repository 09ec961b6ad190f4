"""Import user code by name: `"package.module:function"`, found beside the run file first.

Invariant: a missing module or function is a `ConfigError` that names the places of the search. An
exception inside a module that is imported is the user's own error and keeps its traceback.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain.errors import ConfigError
from dtrain.schema import kebab, unknown_key

PATTERN = "package.module:function"


OBJECT_MODULE = "object"
"""The module in the name of an object that no module defines."""


_REGISTERED: dict[tuple[str, str], Any] = {}
"""Objects of runs that were made in this process, by name and fingerprint."""


def import_object(target: str, folder: Path, kind: str) -> Callable[..., Any]:
    """Import the module that `target` names and return its function or class.

    The folder stays first on the import path, since user functions may import later, too.

    Parameters
    ----------
    target : str
        `"package.module:function"`.
    folder : Path
        The run file's folder.
    kind : str
        Use of the object ("model", "data"), for the messages.

    Raises
    ------
    ConfigError
        The target is malformed, the module or the function is missing, or it cannot be called.
    """
    name, _, function = target.partition(":")
    if name == OBJECT_MODULE or "<" in function:
        raise ConfigError(
            "user-code.object-only",
            f"{kind} '{target}' was given as a Python object that no module defines by name: use "
            "it in the script that made it, or define it at the top of a module",
        )
    if "-" in name and all(part.isidentifier() for part in name.replace("-", "_").split(".")):
        raise ConfigError(
            "user-code.module-name-hyphen",
            f"{kind} '{target}': Python cannot import a module whose name has a hyphen: rename "
            f"the file to {name.replace('-', '_').replace('.', '/')}.py",
        )
    if not all(part.isidentifier() for part in [*name.split("."), function]):
        raise ConfigError(
            "user-code.malformed-name", f"{kind} '{target}' is not of the form '{PATTERN}'"
        )
    module = _import_module(name, folder.resolve(), f"{kind} '{target}'")
    imported = getattr(module, function, None)
    if not callable(imported):
        file = getattr(module, "__file__", None) or "a built-in module"
        raise ConfigError(
            "user-code.no-function",
            f"{kind} '{target}': {file} has no function called '{function}': define it there",
        )
    return imported  # type: ignore[no-any-return]


def register_object(value: Any) -> tuple[str, str]:
    """Return name and fingerprint of an object, by which `registered_object` finds it."""
    key = object_name(value), fingerprint(value)
    _REGISTERED[key] = value
    return key


def registered_object(name: str, fingerprint: str) -> Any:
    """Return the object of a run that was made in this process; None: it is to be imported.

    Objects of the script are not imported, since that would run the script again.
    """
    module, _, function = name.partition(":")
    if module not in (OBJECT_MODULE, _script_name()) and "<" not in function:
        return None
    return _REGISTERED.get((name, fingerprint))


def fingerprint(value: Any) -> str:
    """Return a hash of an object that its name does not identify, else ""."""
    return ""


def object_name(kind: Callable[..., Any]) -> str:
    """Return the name under which `import_object` finds a class or a function again.

    The script that Python runs is the module `__main__`; its classes are named by its file.
    """
    if not hasattr(kind, "__qualname__"):
        return f"{OBJECT_MODULE}:{type(kind).__name__}"
    module = kind.__module__
    return f"{_script_name() if module == '__main__' else module}:{kind.__qualname__}"


def _script_name() -> str:
    """Return the name as which other processes import the script that Python runs."""
    file = script_file()
    return "__main__" if file is None else file.stem


def script_file() -> Path | None:
    """Return the script that Python runs; None in an interactive session."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return None if file is None else Path(file).resolve()


def _import_module(name: str, folder: Path, description: str) -> ModuleType:
    """Import a module with `folder` first on the import path."""
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only this module, or a package on the way to it: another missing module is a mistake
        # inside the user's code.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            "user-code.no-module",
            f"{description}: there is no module '{name}', neither in {folder} (the run file's "
            "folder) nor on Python's path",
        ) from error


def bind_arguments(
    section: str,
    function: Callable[..., Any],
    fields: Mapping[str, object],
    context: Mapping[str, object] | None = None,
    common_keys: Iterable[str] = (),
) -> dict[str, Any]:
    """Return keyword arguments for `function`: all fields, and the part of the context it takes.

    Parameters
    ----------
    section : str
        The run file's table, for the messages, as in "[model]".
    fields : mapping
        Keys of that table in snake_case; lists become tuples.
    context : mapping, optional
        Values that the program knows (shape, classes); a run file may not set these.
    common_keys : iterable of str
        Keys of the table that are read elsewhere; an unknown key's error lists them.

    Raises
    ------
    ConfigError
        The signature does not take a field, or a required one is missing.
    """
    context = context or {}
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [p for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    legal = [p.name for p in named if p.name not in context]
    for key in fields:
        if key in context or not (takes_any or key in legal):
            legal_keys = [*map(kebab, legal), *common_keys]
            raise unknown_key(f"in {section}", kebab(key), legal_keys)
    required = [p.name for p in named if p.default is p.empty]
    missing = [key for key in required if key not in fields and key not in context]
    for key in missing:
        for context_key in context:
            if context_key in key or key in context_key:
                raise ConfigError(
                    "user-code.argument-name",
                    f"{section} lacks {kebab(key)}: rename the argument '{key}' of the function to "
                    f"'{context_key}', which is filled in, or set {kebab(key)} in the run file",
                )
    if missing:
        raise ConfigError(
            "user-code.missing-argument",
            f"{section} lacks {', '.join(map(kebab, missing))}: add it to the run file",
        )
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return arguments | {
        key: value for key, value in context.items() if takes_any or key in parameters
    }
