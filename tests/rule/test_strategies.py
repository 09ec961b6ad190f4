"""A class of a user is a strategy without a decorator, and all classes are public."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import pytest
from torch import nn

import dtrain.objectives
import dtrain.schedules
import dtrain.syncs
from dtrain.block.lr_schedule import LRSchedule
from dtrain.config.strategies import BASES, BUILT_IN
from dtrain.objectives import OBJECTIVES, AuxHead, BlockSpec, MonoForward
from dtrain.schedules import AsyncSchedule, Flush
from dtrain.schema import Strategy, to_table
from dtrain.syncs import PeriodicSync, UpdateClock


class Focal(AuxHead):
    """A class without a decorator, derived from classes that are no dataclasses."""

    kind: ClassVar[str] = "focal"
    gamma: float = 2.0

    def build_head(self, block: BlockSpec) -> nn.Module:
        return nn.Linear(1, block.classes)


class Deeper(Focal):
    """Fields of both classes, though neither is decorated."""

    layers: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Decorated(AuxHead):
    """As a careful author writes it."""

    gamma: float = 2.0

    def build_head(self, block: BlockSpec) -> nn.Module:
        return nn.Linear(1, block.classes)


class Wide(MonoForward):
    """Derived from a frozen dataclass."""

    width: int = 3


class EveryNth(PeriodicSync):
    """Derived from a dataclass that is not frozen."""

    n: int = 4
    history: list[int] = field(default_factory=list)

    def is_due(self, clock: UpdateClock) -> bool:
        return (clock.update + 1) % self.n == 0


class Always(PeriodicSync):
    """No fields."""

    def is_due(self, clock: UpdateClock) -> bool:
        return True


class Capped(Flush):
    """A schedule."""

    live: int = 2

    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        return min(micro_batches, self.live)


class Late(AsyncSchedule):
    """Fields after those of a dataclass."""

    name: ClassVar[str] = "late"
    extra: int = 0

    def supports(self, route: object) -> bool:
        return True


class Halving(LRSchedule):
    """A learning-rate schedule."""

    depends_on_run_length: ClassVar[bool] = False
    every: int = 5

    def decay_factor(self, update: int, updates_per_epoch: int, total_updates: int) -> float:
        return 0.5 ** (update // self.every)


class OwnInit(AuxHead):
    """A class with an `__init__` of its own."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def build_head(self, block: BlockSpec) -> nn.Module:
        return nn.Linear(1, block.classes)


@pytest.mark.parametrize(
    ("instance", "table"),
    [
        (Focal(gamma=1.0), {"gamma": 1.0}),
        (Focal(), {"gamma": 2.0}),
        (Deeper(gamma=3.0, layers=(5,)), {"gamma": 3.0, "layers": (5,)}),
        (Deeper(1.0), {"gamma": 1.0, "layers": (1, 2)}),
        (Decorated(1.0), {"gamma": 1.0}),
        (Wide(width=5), {"prediction": "final", "features": 2048, "width": 5}),
        (EveryNth(3), {"n": 3, "history": []}),
        (Always(), {}),
        (Capped(live=1), {"live": 1}),
        (
            Late(extra=1),
            {
                "weights": "current",
                "prediction": "none",
                "horizon": 1.0,
                "compensation": "none",
                "extra": 1,
            },
        ),
        (Halving(every=2), {"warmup-updates": 0, "every": 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_annotations_are_fields(instance: Any, table: dict[str, Any]) -> None:
    assert to_table(instance) == table
    assert to_table(copy.deepcopy(instance)) == table


def test_an_own_init_is_kept() -> None:
    assert OwnInit(3.0).gamma == 3.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Focal(2.0, 3.0),  # type: ignore[call-arg]
        lambda: Focal(beta=1.0),  # type: ignore[call-arg]
        lambda: Always(1),  # type: ignore[call-arg]
        lambda: EveryNth(m=1),  # type: ignore[call-arg]
        lambda: AuxHead(),  # type: ignore[abstract]
    ],
)
def test_arguments_that_are_no_fields_are_refused(make: Any) -> None:
    with pytest.raises(TypeError):
        make()


def test_a_class_is_frozen_and_compares_fields_where_its_dataclass_does() -> None:
    assert Wide(width=3) == Wide() != Wide(width=4)
    assert hash(Wide(width=3)) == hash(Wide())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Wide().width = 4  # type: ignore[misc]
    assert EveryNth(2) == EveryNth(2) != EveryNth(3)
    sync = EveryNth(2)
    sync.n = 3
    assert sync == EveryNth(3)
    assert Capped(live=2) != Capped(live=2)  # no dataclass decides it: objects are themselves
    assert isinstance(hash(Focal()), int)


def test_instances_share_no_default() -> None:
    one, other = EveryNth(), EveryNth()
    one.history.append(1)
    assert other.history == []


@pytest.mark.parametrize(
    ("module", "section", "bases"),
    [
        (dtrain.objectives, "objective", {"AuxHead", "Objective", "BlockSpec", "NetworkHead"}),
        (dtrain.syncs, "sync", {"PeriodicSync", "LocalUpdates", "Sync", "UpdateClock"}),
        (dtrain.schedules, "schedule", {"AsyncSchedule", "Schedule", "Flush", "Action", "Route"}),
    ],
)
def test_all_public_classes_are_exported(module: ModuleType, section: str, bases: set[str]) -> None:
    names = set(module.__all__)
    assert names >= bases | {kind.__name__ for kind in BUILT_IN[section].values()}
    assert BASES[section].__name__ in names
    assert names <= vars(module).keys()
    assert all(issubclass(base, Strategy) for base in BASES.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_argument_of_build_head_is_the_block(name: str) -> None:
    assert list(inspect.signature(OBJECTIVES[name].build_head).parameters) == ["self", "block"]


def test_a_class_without_fields_may_have_frozen_subclasses_after_its_first_instance() -> None:
    class Plain(AuxHead):
        def build_head(self, block: BlockSpec) -> nn.Module:
            return nn.Linear(1, block.classes)

    Plain()

    @dataclasses.dataclass(frozen=True)
    class Frozen(Plain):
        every: int = 2

    assert Frozen(every=3) == Frozen(3)
