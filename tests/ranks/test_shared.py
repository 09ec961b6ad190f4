"""What runs in these tests share is what each of them would count by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dtrain.objectives import OBJECTIVES
from dtrain.planning.layout import Layout
from dtrain.planning.memory import MemoryPlan
from dtrain.planning.plan import Plan, make_plan
from tests import pictures, tiny
from tests.counts import COUNTED, kinds

RESNET = {"name": "resnet", "depth": 8, "width": 4}


def planned(objective: str, **told: Any) -> Plan:
    return make_plan(tiny.run(objective__name=objective, micro_batches=1, **told), 3)


def counted(made: Layout) -> list[Any]:
    """Return all that was counted, without the factories, which each plan makes anew."""
    return [
        made.layer_specs,
        made.cuts,
        made.place,
        [replace(part, replacement_layers=None) for part in made.block_layouts],
    ]


CHANGES: list[dict[str, Any]] = [
    {"dtype": "float32"},
    {"optimizer__name": "sgd"},
    {"batch_size": 9},
    {"partition__recompute": True},
    {"partition__frozen": True},
]


@pytest.mark.parametrize(
    ("objective", "told"),
    [*((name, {}) for name in OBJECTIVES), *(("mono-forward", told) for told in CHANGES)],
)
def test_shared_counts_are_those_of_a_plan_by_itself(objective: str, told: dict[str, Any]) -> None:
    """With heads, memory and cuts; what makes them other is told apart."""
    assert all(getattr(place, name) is shared for place, name, shared in COUNTED)
    planned(objective)
    shared = planned(objective, **told)
    table = MemoryPlan(shared).to_dicts()
    with pytest.MonkeyPatch.context() as patch:
        for place, name, once in COUNTED:
            patch.setattr(place, name, once.__wrapped__)
        alone = planned(objective, **told)
        assert counted(shared.layout) == counted(alone.layout)
        assert MemoryPlan(alone).to_dicts() == table


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_norms_are_told_apart(norm: str) -> None:
    run = pictures.run(model=RESNET | {"norm": norm, "groups": 2}, partition__blocks=2)
    assert bool(make_plan(run, 1).layout.coupling_layers) == (norm == "batch")


def test_what_a_user_makes_is_counted_each_time() -> None:
    run = tiny.run(model={"name": "tests.tiny:dropping"})
    assert kinds(make_plan(run, 1).layout.model) is None
    assert kinds(make_plan(tiny.run(), 1).layout.model) is not None
