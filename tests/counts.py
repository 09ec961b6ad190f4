"""Runs of one process share what planning counts.

A plan runs each layer, head and block on tensors without memory to see what it costs, which takes
longer than tiny runs take to train. Every run of a process would count the same, and where ranks
are threads every rank, so it is counted once for all of them, by the structure of the model; what
tells none (a user's own modules) is counted each time, as it is outside of tests.

Invariant: what is shared is pure in its key, and plain numbers: `tests/ranks/test_shared.py`
compares.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import wraps
from typing import Any

import pytest

from dtrain.models.layers import LayerStack
from dtrain.models.shape_inference import infer_layers
from dtrain.planning import layout
from dtrain.planning.block_costs import BlockCosts
from dtrain.planning.memory import MemoryPlan

Count = Callable[..., Any]


def kinds(model: LayerStack) -> Hashable:
    """Return what models of equal structure have in common, None where that is not known."""
    found = tuple((name, model.structure_key(index)) for index, name in enumerate(model.names))
    return None if any(kind is None for _, kind in found) else found


def once(work: Count, key: Callable[..., tuple[Hashable, ...]]) -> Count:
    """Return `work`, done once for each key; one with None in it is not known."""
    known: dict[tuple[Hashable, ...], Any] = {}

    @wraps(work)
    def shared(*given: Any) -> Any:
        told = key(*given)
        if None in told:
            return work(*given)
        if told not in known:
            known[told] = work(*given)
        return known[told]

    return shared


def block_key(books: MemoryPlan, rows: int) -> tuple[Hashable, ...]:
    """Return all that the memory of a plan's blocks depends on."""
    run, made = books.plan.run, books.layout
    told = (kinds(made.model), made.dtype, made.block_layouts, made.objective, made.routes)
    return (*told, repr(run.optimizer), repr(run.partition), rows)


COUNTED: list[tuple[Any, str, Count]] = [
    (
        layout,
        "infer_layers",
        once(infer_layers, lambda model, shape, dtype: (kinds(model), shape, dtype)),
    ),
    (
        BlockCosts,
        "_profile_head",
        once(BlockCosts._profile_head, lambda own, task: (kinds(own.model), own.objective, task)),
    ),
    (MemoryPlan, "_measure_blocks", once(MemoryPlan._measure_blocks, block_key)),
]
"""Where it is looked up, under which name, and what counts once."""


@pytest.fixture(autouse=True, scope="session")
def counted_once() -> Iterator[None]:
    """Count every layer, head and block once in a session."""
    with pytest.MonkeyPatch.context() as patch:
        for place, name, shared in COUNTED:
            patch.setattr(place, name, shared)
        yield
