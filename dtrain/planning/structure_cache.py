"""Results of planning, kept by the structure of what was measured.

A plan runs layers, heads and blocks on tensors without memory, which takes most of its time. Equal
structures have equal results: the heads of several blocks in one plan, and the same model in all
plans of one process (ranks as threads, training and then evaluation).

Invariant: a result is an immutable value and depends on its key alone. A structure without a key
is measured every time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor, nn

from dtrain.models.layers import LayerStack

T = TypeVar("T")


MAX_RESULTS = 4096
"""Results that one cache keeps."""


PLAIN_TYPES = (
    *(type(None), bool, int, float, complex, str, bytes, type),
    *(torch.dtype, torch.device, BuiltinFunctionType),
)
"""Types of immutable values, which a key may contain."""


@final
class StructureCache(Generic[T]):
    """The results that were used last.

    Parameters
    ----------
    max_results : int
        Number of results that are kept; the one that was used least recently is dropped first.
    """

    def __init__(self, max_results: int = MAX_RESULTS) -> None:
        self.max_results = max_results
        self._results: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable | None, compute: Callable[[], T]) -> T:
        """Return the result of `key`; call `compute` where it is not known.

        A key that is None or cannot be hashed is never kept, and neither is an exception.
        """
        try:
            hash(key)
        except TypeError:  # such as an objective of the user's with mutable fields
            key = None
        if key is None:
            return compute()
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
        result = compute()
        with self._lock:
            self._results[key] = result
            if len(self._results) > self.max_results:
                self._results.popitem(last=False)
        return result


def layers_key(model: LayerStack) -> Hashable | None:
    """Return a key of names and structure of all layers, None where one has no known structure."""
    layers = [(name, model.structure_key(index)) for index, name in enumerate(model.names)]
    return None if any(structure is None for _, structure in layers) else tuple(layers)


def module_key(module: nn.Module) -> Hashable | None:
    """Return a key of all that decides what a module on the meta device computes.

    It holds class, attributes, and the shapes of parameters and buffers, of all submodules. None
    where an attribute is not plain: a tensor with values, an object, a mutable collection of these.
    """
    try:
        return _attribute_key(module, {})
    except _UnknownStructureError:
        return None


class _UnknownStructureError(Exception):
    """An attribute has no key."""


def _attribute_key(value: Any, numbers: dict[int, int]) -> Hashable:
    """Return the key of one attribute; `numbers` holds the modules and tensors so far, by id."""
    if isinstance(value, PLAIN_TYPES):
        return type(value), value
    if isinstance(value, nn.Module | Tensor):
        if id(value) in numbers:  # the same object again, which equal objects are not
            return numbers[id(value)]
        numbers[id(value)] = len(numbers)
    match value:
        case nn.Module():
            return type(value), _attribute_key(vars(value), numbers)
        case Tensor(is_meta=True):
            layout = value.shape, value.stride(), value.dtype, value.requires_grad
            return type(value), *layout, _attribute_key(vars(value), numbers)
        case Mapping():
            pairs = tuple((name, _attribute_key(item, numbers)) for name, item in value.items())
            return type(value), pairs
        case list() | tuple():
            return type(value), tuple(_attribute_key(item, numbers) for item in value)
        case set() | frozenset():
            return type(value), frozenset(_attribute_key(item, numbers) for item in value)
        case FunctionType(__closure__=None):
            return value
    raise _UnknownStructureError
