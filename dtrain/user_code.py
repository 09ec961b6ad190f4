"""Import user code by name, `"package.module:function"`, and name user objects for the records.

Invariant: a missing module or function is a `ConfigError` that names the places of the search. An
exception inside a module that is imported is the user's own error and keeps its traceback. An
object that no import finds again has a fingerprint, the same in every process that runs the same
code.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from dtrain.errors import ConfigError
from dtrain.schema import kebab, unknown_key

PATTERN = "package.module:function"


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
    imported = _attribute(module, function)
    if not callable(imported):
        file = getattr(module, "__file__", None) or "a built-in module"
        raise ConfigError(
            "user-code.no-function",
            f"{kind} '{target}': {file} has no function called '{function}': define it there",
        )
    return imported  # type: ignore[no-any-return]


def object_name(item: object) -> str:
    """Return the name of an object, under which `import_object` finds it if it `is_importable`.

    An instance has the name of its class, a `functools.partial` that of its function. The script
    that Python runs is the module `__main__`; its objects are named by its file.
    """
    kind = _definition(item)
    return f"{_module_name(kind.__module__)}:{kind.__qualname__}"


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
    return _attribute(module, item.__qualname__) is item


def fingerprint(item: object) -> str:
    """Return 16 hexadecimal digits that tell an object from others of the same `object_name`.

    It covers the source of functions and classes (their bytecode, where there is no source), with
    defaults and the variables of enclosing functions that they use; the numbers of arrays and
    tensors; the elements of collections; the attributes of other instances. It covers the classes
    and the structure of an `nn.Module`, but not its weights: they may be drawn anew in every start,
    and a resumed run has those of its checkpoint. It does not cover global variables.
    """
    return _Fingerprints().of(item)


def _definition(item: object) -> Any:
    """Return the function or class that names an object."""
    if isinstance(item, partial):
        return _definition(item.func)
    has_name = hasattr(item, "__qualname__") and getattr(item, "__module__", None) is not None
    return item if has_name else type(item)


def _module_name(name: str) -> str:
    """Return the name of a module, that of its file for the script that Python runs."""
    file = getattr(sys.modules.get(name), "__file__", None) if name == "__main__" else None
    return Path(file).stem if file else name


def _attribute(module: object, path: str) -> Any:
    """Return the object at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


class _Fingerprints:
    """The fingerprints of one object and of its parts; an object that contains itself ends there.

    Torch and numpy are looked up among the imported modules: this module imports neither.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, object]] = {}  # the object, so that its id stays its own
        self._open: list[int] = []

    def of(self, item: object) -> str:
        """Return the fingerprint of an object of any type."""
        if id(item) in self._known:
            return self._known[id(item)][0]
        if id(item) in self._open:
            return f"{len(self._open) - self._open.index(id(item))} above"
        self._open.append(id(item))
        digest = blake2b(digest_size=8)
        for part in (type(item).__qualname__, *self._parts(item)):
            content = part if isinstance(part, bytes) else part.encode()
            digest.update(f"{len(content)}:".encode() + content)
        self._open.pop()
        self._known[id(item)] = digest.hexdigest(), item
        return digest.hexdigest()

    def _all(self, items: Iterable[object]) -> Iterator[str]:
        return map(self.of, items)

    def _parts(self, item: Any) -> Iterable[str | bytes]:
        """Return the texts, bytes and fingerprints of which an object consists."""
        array = _array_content(item)
        if array is not None:
            return array
        match item:
            case Mapping():
                return self._all(part for pair in item.items() for part in pair)
            case list() | tuple():
                return self._all(item)
            case set() | frozenset():
                return sorted(self._all(item))
            case type():
                return self._class_parts(item)
            case FunctionType():
                return self._function_parts(item)
            case MethodType():
                return self._all((item.__func__, item.__self__))
            case partial():
                return self._all((item.func, item.args, item.keywords))
            case CodeType():
                names, constants = (*item.co_names, *item.co_varnames), self._all(item.co_consts)
                return [item.co_code, *names, *constants]
        return self._instance_parts(item)

    def _class_parts(self, kind: type) -> Iterator[str | bytes]:
        """Yield the name of a class of a library; else its source, or its members without one.

        The variables of enclosing functions that its methods use are in no source.
        """
        yield object_name(kind)
        if _is_library(kind):
            return
        source = _source(kind)
        yield source or ""
        yield from self._all(base for base in kind.__bases__ if base is not object)
        for name, member in vars(kind).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(function, FunctionType):
                if source is None or function.__closure__:
                    yield name
                    yield from self._function_parts(function)
            elif source is None and not name.startswith("__") and not hasattr(member, "__get__"):
                yield name
                yield self.of(member)

    def _function_parts(self, function: FunctionType) -> Iterator[str | bytes]:
        yield _source(function) or self.of(function.__code__)
        yield from self._all((function.__defaults__, function.__kwdefaults__))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            yield name
            yield self.of(_cell_content(cell))

    def _instance_parts(self, item: Any) -> Iterator[str | bytes]:
        """Yield class and attributes of an instance, or its text; of a module the structure."""
        torch = sys.modules.get("torch")
        if hasattr(item, "__qualname__"):  # a function of an extension module
            yield from (object_name(item), item.__qualname__)
            return
        yield self.of(type(item))
        if torch is not None and isinstance(item, torch.nn.Module):
            yield repr(item)
            for name, tensor in item.state_dict().items():
                yield f"{name} {getattr(tensor, 'dtype', '')} {getattr(tensor, 'shape', '')}"
            yield from self._all(dict.fromkeys(type(module) for module in item.modules()))
        elif hasattr(item, "__dict__"):
            yield from self._all(part for pair in vars(item).items() for part in pair)
        elif " at 0x" not in repr(item):
            yield repr(item)


def _source(item: Any) -> str | None:
    """Return the source of a function or class, None where there is no file of it."""
    try:
        return textwrap.dedent(inspect.getsource(item)).strip()
    except (OSError, TypeError):
        return None


def _is_library(kind: type) -> bool:
    """Return whether a class belongs to Python, torch, numpy or dtrain, which have versions."""
    root = kind.__module__.partition(".")[0]
    return root in sys.stdlib_module_names or root in ("torch", "numpy", "dtrain")


def _cell_content(cell: Any) -> object:
    """Return the value of a variable of an enclosing function, None before it has one."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _array_content(item: Any) -> tuple[str, str, bytes] | None:
    """Return dtype, shape and bytes of an array or a tensor, None for other objects."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(item, torch.Tensor):
        content = b""
        if item.numel() and not item.is_meta:
            flat = item.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
            content = flat.view(torch.uint8).numpy().tobytes()
        return str(item.dtype), str(tuple(item.shape)), content
    if numpy is not None and isinstance(item, numpy.ndarray):
        content = repr(item.tolist()).encode() if item.dtype.hasobject else item.tobytes()
        return str(item.dtype), str(item.shape), content
    return None


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
