"""Import user code by name, `"package.module:function"`, and find objects given in Python.

Invariant: a missing module or function is a `ConfigError` that names the places of the search. An
exception inside a module that is imported is the user's own error and keeps its traceback. An
object that no import finds again has a fingerprint, the same in every process that runs the same
code.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain.errors import ConfigError
from dtrain.fingerprint import fingerprint
from dtrain.object_names import find_attribute, is_importable, module_name, object_name
from dtrain.schema import kebab, unknown_key

PATTERN = "package.module:function"


ARRAYS = "arrays"
"""The name of data that were given in Python."""


_AMBIGUOUS = object()


_REGISTERED: dict[tuple[str, str], Any] = {}
"""Objects of runs that were made in this process, by name and fingerprint."""


_IMPORTING: list[str] = []
"""The objects whose modules are being imported at this moment."""


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
    if "-" in name and all(part.isidentifier() for part in name.replace("-", "_").split(".")):
        raise ConfigError(
            "user-code.module-name-hyphen",
            f"{kind} '{target}': Python cannot import a module whose name has a hyphen: rename "
            f"the file to {name.replace('-', '_').replace('.', '/')}.py",
        )
    if "<" in function:  # as in "script:main.<locals>.Focal"
        raise ConfigError(
            "user-code.local-object",
            f"{kind} '{target}' was defined inside a function, where no run file finds it: start "
            "the Python script that defines it, or define it at the top of its module",
        )
    if not all(part.isidentifier() for part in [*name.split("."), *function.split(".")]):
        raise ConfigError(
            "user-code.malformed-name", f"{kind} '{target}' is not of the form '{PATTERN}'"
        )
    module = _import_module(name, folder.resolve(), f"{kind} '{target}'")
    imported = find_attribute(module, function)
    if not callable(imported):
        file = getattr(module, "__file__", None) or "a built-in module"
        raise ConfigError(
            "user-code.no-function",
            f"{kind} '{target}': {file} has no function called '{function}': define it there",
        )
    return imported  # type: ignore[no-any-return]


def refuse_during_import() -> None:
    """Refuse to train while a module is imported for an object that a run names.

    Raises
    ------
    ConfigError
        The script of a run has no main guard, so that an evaluation, say, would train again.
    """
    if _IMPORTING:
        raise ConfigError(
            "user-code.trains-on-import",
            f"{_IMPORTING[-1]} is imported, but its module starts a training: put the training "
            'under `if __name__ == "__main__":`, so that other processes can import the module',
        )


@contextmanager
def importing(description: str) -> Iterator[None]:
    """Let `refuse_during_import` refuse while modules are imported.

    Parameters
    ----------
    description : str
        What is imported, for the message.
    """
    _IMPORTING.append(description)
    try:
        yield
    finally:
        _IMPORTING.pop()


def register_object(value: Any) -> tuple[str, str]:
    """Return name and fingerprint of an object, by which `registered_object` finds it.

    The fingerprint is empty where the name identifies the object. Data that are no function are
    named `ARRAYS`: the contents of a data set are compared apart from its name.
    """
    key = object_name(value), "" if is_importable(value) else fingerprint(value)
    _register(key, value)
    return key


def register_arrays(value: Any) -> str:
    """Return the name of data that were given in Python."""
    _register((ARRAYS, ""), value)
    return ARRAYS


def registered_object(name: str, fingerprint: str) -> Any:
    """Return the object of a run that was made in this process; None: it is to be imported.

    Objects of the script are not imported, since that would run the script again.

    Raises
    ------
    ConfigError
        Several objects of this process have that name.
    """
    if not fingerprint and name != ARRAYS and name.partition(":")[0] != module_name("__main__"):
        return None
    found = _REGISTERED.get((name, fingerprint))
    if found is _AMBIGUOUS:
        raise ConfigError(
            "user-code.object-ambiguous",
            f"several runs of this process were given '{name}': pass the run, too (run=...)",
        )
    return found


class GivenArray:
    """An array or a list that was given in Python as the value of a key.

    Attributes
    ----------
    array : array, tensor or list
        The value.
    """

    def __init__(self, array: Any) -> None:
        self.array = array


def value_text(value: Any) -> str:
    """Return the text of a run file for a function or an array that is the value of a key: its
    name, and its fingerprint where the name does not identify it."""
    if isinstance(value, str):
        return value
    return " ".join(register_object(_given(value))).strip()


def find_value(value: Any, folder: Path, key: str) -> Any:
    """Return the function or the array that is the value of a key, given its text or itself.

    Raises
    ------
    ConfigError
        No module has it, or it was given in Python in another process.
    """
    if not isinstance(value, str):
        return _given(value)
    name, _, fingerprint = value.partition(" ")
    target = registered_object(name, fingerprint)
    require_object(target, name, fingerprint, key)
    return import_object(name, folder, key) if target is None else target


def _given(value: Any) -> Any:
    return value.array if isinstance(value, GivenArray) else value


def require_object(target: object, name: str, fingerprint: str, kind: str) -> None:
    """Refuse an object that was given in Python in another process and cannot be imported."""
    if target is None and (fingerprint or name == ARRAYS):
        raise ConfigError(
            "user-code.object-only",
            f"{kind} '{name}' was given as a Python object that no other process can import: use "
            "the run in the script that made it, or define the object at the top of a module",
        )


def _register(key: tuple[str, str], value: Any) -> None:
    is_known = _REGISTERED.get(key, value) is value
    _REGISTERED[key] = value if is_known else _AMBIGUOUS


def _import_module(name: str, folder: Path, description: str) -> ModuleType:
    """Import a module with `folder` first on the import path."""
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        with importing(description):
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
