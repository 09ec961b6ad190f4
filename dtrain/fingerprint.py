"""Fingerprints of objects that users give in Python and that a name does not identify."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from types import CodeType, FunctionType, MethodType
from typing import Any

from dtrain.object_names import object_name


def fingerprint(item: object) -> str:
    """Return 16 hexadecimal digits that tell an object from others of the same `object_name`.

    It covers the source of functions and classes (their bytecode, where there is no source), with
    defaults and the variables of enclosing functions that they use; the numbers of arrays and
    tensors; the elements of collections; the attributes of other instances. It covers the classes
    and the structure of an `nn.Module`, but not its weights: they may be drawn anew in every start,
    and a resumed run has those of its checkpoint. It does not cover global variables.
    """
    return _Fingerprints().of(item)


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
