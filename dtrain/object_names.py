"""Names of functions, classes and objects that users give in Python.

Invariant: a name is "module:qualified.name"; the script that Python runs is named by its file.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any


def object_name(item: object) -> str:
    """Return the name of an object, under which `import_object` finds it if it `is_importable`.

    An instance has the name of its class, a `functools.partial` that of its function. The script
    that Python runs is the module `__main__`; its objects are named by its file.
    """
    kind = _definition(item)
    return f"{module_name(kind.__module__)}:{kind.__qualname__}"


def is_importable(item: object) -> bool:
    """Return whether `import_object` finds this very object under its `object_name`.

    Functions and classes at the top of a module or of a class are found; instances, lambdas, and
    all that is defined inside a function, in a notebook or at a prompt are not.
    """
    if item is not _definition(item):
        return False
    module = sys.modules.get(item.__module__)
    if item.__module__ == "__main__" and getattr(module, "__file__", None) is None:
        return False
    return find_attribute(module, item.__qualname__) is item


def _definition(item: object) -> Any:
    """Return the function or class that names an object."""
    if isinstance(item, partial):
        return _definition(item.func)
    has_name = hasattr(item, "__qualname__") and getattr(item, "__module__", None) is not None
    return item if has_name else type(item)


def module_name(name: str) -> str:
    """Return the name of a module, that of its file for the script that Python runs."""
    file = getattr(sys.modules.get(name), "__file__", None) if name == "__main__" else None
    return Path(file).stem if file else name


def find_attribute(module: object, path: str) -> Any:
    """Return the object at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def script_file() -> Path | None:
    """Return the script that Python runs; None in an interactive session."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return None if file is None else Path(file).resolve()
