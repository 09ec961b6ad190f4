"""Results that planning keeps: a key holds everything that decides a result, and no more."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.objectives import OBJECTIVES
from dtrain.planning.plan import make_plan
from dtrain.planning.report import plan_table
from dtrain.planning.structure_cache import StructureCache, layers_key, module_key
from tests import pictures, tiny
from tests.harness import FULL

CHANGES: list[dict[str, Any]] = [
    {"dtype": "float32"},
    {"optimizer__name": "sgd"},
    {"batch_size": 9},
    {"partition__recompute": True},
    {"partition__recompute": [1]},
    {"partition__frozen": True},
    {"partition": {"cuts": [1, 2]}},
    {"model__widths": [13, 11, 7, 5]},
    {"model__activation": "tanh"},
]


def make_table(objective: str, **changes: Any) -> dict[str, Any]:
    run = tiny.run(objective__name=objective, micro_batches=1, **changes)
    return plan_table(make_plan(run, 3))


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        *((name, {}) for name in (OBJECTIVES if FULL else tiny.PATTERNS)),
        *(("mono-forward", change) for change in CHANGES),
    ],
)
def test_kept_results_are_those_of_a_plan_by_itself(
    objective: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_table(objective)
    cached = make_table(objective, **changes)
    monkeypatch.setattr(StructureCache, "get", lambda self, key, compute: compute())
    assert make_table(objective, **changes) == cached


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_layers_of_different_norms_have_different_results(norm: str) -> None:
    model = {"name": "resnet", "depth": 8, "width": 4, "norm": norm, "groups": 2}
    plan = make_plan(pictures.run(model=model, partition__blocks=2), 1)
    assert any(spec.couples_samples for spec in plan.layout.layer_specs) == (norm == "batch")


def test_a_second_plan_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    make_table("mono-forward")

    def fail(*_: object) -> None:
        raise AssertionError

    for name in ("layout.infer_layers", "block_costs.profile_module"):
        monkeypatch.setattr(f"dtrain.planning.{name}", fail)
    monkeypatch.setattr("dtrain.planning.memory_plan.measure_block_memory", fail)
    make_table("mono-forward")


def test_a_users_sequential_has_no_key() -> None:
    users = make_plan(tiny.run(model={"name": "tests.tiny:dropping"}), 1).layout.model
    assert layers_key(users) is None
    assert layers_key(make_plan(tiny.run(), 1).layout.model) is not None


def make_module(**changes: Any) -> nn.Sequential:
    """Return a network on the meta device."""
    fields = {"width": 4, "stride": 1, "inplace": False, "groups": 2} | changes
    with torch.device("meta"):
        return nn.Sequential(
            nn.Conv2d(3, fields["width"], 3, stride=fields["stride"]),
            nn.GroupNorm(fields["groups"], fields["width"]),
            nn.ReLU(fields["inplace"]),
            nn.Flatten(),
        )


def test_equal_modules_have_equal_keys() -> None:
    key = module_key(make_module())
    assert key is not None
    assert key == module_key(make_module())


def add_hook(module: nn.Sequential) -> None:
    module[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.eval(),
        lambda module: module.double(),
        lambda module: module[0].requires_grad_(False),
        lambda module: setattr(module, "label", "a"),
        add_hook,
        lambda module: module.append(nn.ReLU()),
    ],
)
def test_a_module_that_differs_has_another_key(change: Callable[[nn.Sequential], object]) -> None:
    module = make_module()
    change(module)
    assert module_key(module) != module_key(make_module())


@pytest.mark.parametrize("change", [{"width": 6}, {"stride": 2}, {"inplace": True}, {"groups": 1}])
def test_arguments_of_layers_are_part_of_the_key(change: dict[str, Any]) -> None:
    assert module_key(make_module(**change)) != module_key(make_module())


def test_a_shared_layer_is_not_two_equal_ones() -> None:
    shared, separate = make_module(), make_module()
    shared.append(shared[2])
    separate.append(nn.ReLU())
    assert module_key(shared) != module_key(separate)


def test_values_and_objects_have_no_key() -> None:
    assert module_key(nn.Linear(3, 2)) is None  # on the CPU, where weights have values
    module = make_module()
    module.state = object()
    assert module_key(module) is None


def test_a_cache_keeps_the_results_that_were_used_last() -> None:
    cache: StructureCache[int] = StructureCache(max_results=2)
    computed: list[Hashable] = []

    def use(key: Hashable) -> None:
        def compute() -> int:
            computed.append(key)
            return hash(key)

        assert cache.get(key, compute) == hash(key)

    for key in ("a", "b", "a", "c", "a", "b", None, None):
        use(key)
    assert computed == ["a", "b", "c", "b", None, None]


def test_exceptions_and_mutable_keys_are_not_kept() -> None:
    cache: StructureCache[int] = StructureCache()

    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.get("a", fail)
    assert cache.get("a", lambda: 1) == 1
    assert [cache.get([], lambda number=number: number) for number in (1, 2)] == [1, 2]
