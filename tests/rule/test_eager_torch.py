"""Functions of torch without its compiler: the same results, and the compiler once it is there."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain import eager_torch


def graph() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return a leaf, two tensors that depend on it, and a cotangent for each."""
    leaf = torch.linspace(-1, 2, 6, dtype=torch.float64).requires_grad_()
    hidden = leaf.exp()
    return (
        leaf,
        [hidden * leaf, hidden.sum()],
        [torch.arange(6.0).double(), torch.tensor(0.3).double()],
    )


@pytest.mark.parametrize("to_inputs", [False, True])
def test_backward_adds_the_gradients_of_autograd(to_inputs: bool) -> None:
    results = []
    for backward in (eager_torch.backward, torch.autograd.backward):
        leaf, tensors, cotangents = graph()
        leaf.grad = torch.ones_like(leaf)
        arguments: dict[str, Any] = {"inputs": [leaf]} if to_inputs else {}
        backward(tensors, cotangents, **arguments)
        results.append(leaf.grad)
        with pytest.raises(RuntimeError):  # the graph is freed
            backward(tensors, cotangents, **arguments)
    assert torch.equal(*results)


def test_gradients_are_those_of_autograd_and_keep_the_graph() -> None:
    leaf, tensors, cotangents = graph()
    unused = torch.ones(2, requires_grad=True)
    for _ in range(2):
        ours, nothing = eager_torch.gradients(tensors, [leaf, unused], cotangents)
        assert nothing is None
        assert leaf.grad is None
        [theirs] = torch.autograd.grad(tensors, [leaf], cotangents, retain_graph=True)
        assert ours is not None
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1,), (2, 6), (5,), ()])
def test_a_cotangent_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    leaf, [tensor, _], _ = graph()
    cotangent = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        eager_torch.gradients([tensor], [leaf], [cotangent])
    with pytest.raises(RuntimeError):
        eager_torch.backward([tensor], [cotangent])


def test_a_deferred_function_is_disabled_as_soon_as_the_compiler_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    @torch._disable_dynamo
    def function(number: int) -> int:
        calls.append("plain")
        return 2 * number

    def disable(inner: Any, *_: Any, **__: Any) -> Any:
        return lambda number: calls.append("disabled") or inner(number)

    eager_torch.defer_dynamo(function)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert function(1) == 2
    assert calls == ["plain"]
    assert "torch._dynamo" not in sys.modules
    compiler = SimpleNamespace(disable=disable)
    monkeypatch.setitem(sys.modules, "torch._dynamo", compiler)  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "_dynamo", compiler, raising=False)
    assert [function(2), function(3)] == [4, 6]
    assert calls[-4:].count("disabled") == 2
