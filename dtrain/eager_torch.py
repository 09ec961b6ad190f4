"""Functions of torch without the slow imports of its compiler.

torch imports its compiler, or the symbolic shapes of it, in functions that also run without it:

* functions under `_disable_dynamo` import `torch._dynamo` at their first call, so that the compiler
  skips them: more than a second on each rank;
* `torch.autograd` imports sympy to compare shapes with unknown sizes: a quarter of a second;
* `torch.autograd.forward_ad` compiles formulas that few operations need: a second or more.

Nothing is compiled before somebody imports the compiler, so until then there is nothing to skip.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, _compile, nn
from torch.autograd import forward_ad, graph

DISABLED = "__dynamo_disable"
"""Attribute in which torch keeps the function that it calls in the place of the wrapped one."""


PLAIN_TENSORS = (Tensor, nn.Parameter)
"""Types of tensors without code of their own in the backward."""


_make_dual: Callable[..., Any] | None = getattr(torch._VF, "_make_dual", None)


_run_engine: Callable[..., Any] | None = getattr(graph, "_engine_run_backward", None)


def defer_dynamo(*wrappers: Callable[..., Any]) -> None:
    """Let functions under `_disable_dynamo` run as they are until somebody imports `torch._dynamo`.

    A function without that wrapper is left as it is.
    """
    for wrapper in wrappers:
        function = getattr(wrapper, "__wrapped__", None)
        if function is not None and not hasattr(function, DISABLED):
            setattr(function, DISABLED, _deferred(function, wrapper))


def _deferred(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Return what torch calls instead of `function` until the compiler is imported."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if hasattr(sys.modules.get("torch._dynamo"), "disable"):
            vars(function).pop(DISABLED, None)  # torch makes its own at the next call
            return wrapper(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def backward(
    tensors: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor] = ()
) -> None:
    """Add the gradients of tensors to their leaves, or to `inputs` alone, as
    `torch.autograd.backward` does."""
    if _run_engine is None or not _agree(tensors, cotangents):
        torch.autograd.backward(tensors, cotangents, inputs=inputs or None)
        return
    _run_engine(
        tuple(tensors),
        tuple(cotangents),
        False,  # keep_graph
        False,  # create_graph
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def gradients(
    tensors: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of tensors at `inputs`, None where one is unused; keep the graph.

    It is `torch.autograd.grad` with `retain_graph` and `allow_unused`.
    """
    if _run_engine is None or not _agree(tensors, cotangents):
        return torch.autograd.grad(
            tensors, inputs, cotangents, retain_graph=True, allow_unused=True
        )
    result: tuple[Tensor | None, ...] = _run_engine(
        tuple(tensors),
        tuple(cotangents),
        True,  # keep_graph
        False,  # create_graph
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return result


def dual_level() -> AbstractContextManager[Any]:
    """Return a level of `torch.autograd.forward_ad`: inside it tensors may have tangents.

    Tangents of zero run functions of `torch._refs`, which are under `_disable_dynamo`.
    """
    _defer_references()
    return forward_ad.dual_level()


@cache
def _defer_references() -> None:
    """Let the functions of `torch._refs` run as they are: see `defer_dynamo`."""
    for function in list(vars(getattr(torch, "_refs", None) or object).values()):
        while callable(function) and hasattr(function, "__wrapped__"):
            code, cells = (
                getattr(function, "__code__", None),
                getattr(function, "__closure__", None),
            )
            if code is not None and code.co_filename == _compile.__file__ and cells:
                # Its `__wrapped__` may be another function than the one that it calls.
                called = dict(zip(code.co_freevars, cells, strict=True))["fn"].cell_contents
                if not hasattr(called, DISABLED):
                    setattr(called, DISABLED, _deferred(called, function))
            function = function.__wrapped__


def make_dual(tensor: Tensor, tangent: Tensor) -> Tensor:
    """Return a tensor with a tangent, as `torch.autograd.forward_ad.make_dual` does.

    An operation whose formula has not been compiled raises NotImplementedError: see
    `load_forward_formulas`.
    """
    level = getattr(forward_ad, "_current_level", None)
    if _make_dual is None or not isinstance(level, int):
        return cast(Tensor, forward_ad.make_dual(tensor, tangent))  # type: ignore[no-untyped-call]
    dual: Tensor = _make_dual(tensor, tangent, level=level)
    return dual


def unpack_dual(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the values and the tangent of a tensor, None where it has no tangent."""
    primal, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return primal, tangent


@contextmanager
def without_onednn() -> Iterator[None]:
    """Run torch's own kernels on a CPU in place of those of oneDNN, some of which lack tangents."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def load_forward_formulas() -> None:
    """Compile the formulas of forward-mode differentiation that torch has in Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _agree(tensors: Sequence[Tensor], cotangents: Sequence[Tensor]) -> bool:
    """Return whether tensors are plain, and cotangents have their shapes and dtypes.

    Otherwise `torch.autograd` decides: it raises an error, or it knows the subclass.
    """
    return len(tensors) == len(cotangents) and all(
        type(tensor) in PLAIN_TENSORS
        and type(cotangent) in PLAIN_TENSORS
        and tensor.dtype is cotangent.dtype
        and tensor.shape == cotangent.shape
        for tensor, cotangent in zip(tensors, cotangents, strict=True)
    )
