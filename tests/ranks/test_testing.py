"""`dtrain.testing`: what dtrain has keeps every law, and a broken strategy breaks the right one.

`DTRAIN_FULL=1` checks all that dtrain has. The strategies of this file are those of a user, without
a decorator.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrain.testing
from dtrain.errors import ConfigError, DtrainError
from dtrain.objectives import (
    OBJECTIVES,
    AuxHead,
    BlockSpec,
    MonoForward,
    Objective,
)
from dtrain.schedules import (
    SCHEDULES,
    Action,
    Flush,
    OneFOneB,
    Pipelined,
    Route,
    Schedule,
    Stream,
)
from dtrain.schema import build_strategy
from dtrain.syncs import (
    SYNCS,
    LocalUpdates,
    PeriodicSync,
    Sync,
    SynchronousSync,
    UpdateClock,
    WeightedGroup,
)
from dtrain.testing import LawError, LawReport, check_objective, check_schedule, check_sync
from tests.harness import FULL
from tests.ranks.test_sync_laws import CASES
from tests.refusals import refuses

# ---- objectives


class Focal(AuxHead):
    """Focal loss: a head per earlier block."""

    gamma: float = 2.0

    def build_head(self, block: BlockSpec) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(block.output_shape), block.classes))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        logp = torch.log_softmax(output, 1).gather(1, target[:, None])
        return (-((1 - logp.exp()) ** self.gamma) * logp).mean()


class Numbers(MonoForward):
    """Learns real numbers alone."""

    def serves(self, task: Any) -> str | None:
        return None if task.kind == "values" else "needs numbers"


class Dropping(Focal):
    """Heads with dropout: every micro-batch has its own random numbers."""

    def build_head(self, block: BlockSpec) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), super().build_head(block))


class Normalised(Focal):
    """Heads with batch statistics; the bias before them has a gradient of 0."""

    def build_head(self, block: BlockSpec) -> nn.Module:
        return nn.Sequential(super().build_head(block), nn.BatchNorm1d(block.classes))


class Undefined(Focal):
    """A loss that is not finite."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.sum() * 0).log()


class Idle(Focal):
    """A head with a parameter that no loss uses."""

    def build_head(self, block: BlockSpec) -> nn.Module:
        head = super().build_head(block)
        head.register_parameter("unused", nn.Parameter(torch.ones(1)))
        return head


class Meddling(Focal):
    """Its blocks decay the weights of the block before, which a global has."""

    known_blocks: ClassVar[dict[int, Any]] = {}

    def backward_pairs(self, spec: BlockSpec, block: Any, micro_batch: Any) -> list[Any]:
        self.known_blocks[spec.index] = block
        pairs = super().backward_pairs(spec, block, micro_batch)
        if spec.index == 0:
            return pairs
        earlier = next(iter(self.known_blocks[spec.index - 1].parameters.values()))
        decay = (earlier**2).sum()
        return [*pairs, (decay, torch.full_like(decay, micro_batch.loss_scale))]


class Peeking(Focal):
    """Reads the weights of the next block from a global."""

    known_blocks: ClassVar[dict[int, Any]] = {}

    def backward_pairs(self, spec: BlockSpec, block: Any, micro_batch: Any) -> list[Any]:
        self.known_blocks[spec.index] = block
        pairs = super().backward_pairs(spec, block, micro_batch)
        later = self.known_blocks.get(spec.index + 1)
        if later is None:
            return pairs
        scale = next(iter(later.parameters.values())).detach().abs().mean()
        return [(tensor, cotangent * scale) for tensor, cotangent in pairs]


class MeanOfMeans(Focal):
    """All classes of a micro-batch count alike."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        classes = target.unique()
        means = [cross_entropy(output[target == c], target[target == c]) for c in classes]
        return torch.stack(means).mean()


class Unscaled(Focal):
    """Forgets the part of a micro-batch in its update."""

    def backward_pairs(self, spec: BlockSpec, block: Any, micro_batch: Any) -> list[Any]:
        pairs = super().backward_pairs(spec, block, micro_batch)
        return [(tensor, torch.ones_like(cotangent)) for tensor, cotangent in pairs]


class Annealed(Focal):
    """Counts its updates in an attribute of the head that no checkpoint has."""

    def build_head(self, block: BlockSpec) -> nn.Module:
        head = super().build_head(block)
        head.updates = 0  # type: ignore[assignment]
        return head

    def after_update(self, spec: BlockSpec, block: Any, received: Mapping[str, Tensor]) -> None:
        if block.head is not None:
            block.head.updates += 1

    def predict(self, spec: BlockSpec, block: Any, micro_batch: Any) -> Tensor:
        scores = super().predict(spec, block, micro_batch)
        return scores if block.head is None else scores / (1 + block.head.updates)


class Greedy(Focal):
    """Plans memory that it does not need."""

    def cached_bytes_per_sample(self, spec: BlockSpec) -> int:
        return 100_000


class Telepathic(Focal):
    """Predicts by the scores of block 0, too, which only blocks on the same rank know."""

    def predict(self, spec: BlockSpec, block: Any, micro_batch: Any) -> Tensor:
        scores = super().predict(spec, block, micro_batch)
        if spec.index == 0:
            self.__dict__["first"] = scores.mean(0)
        return scores + self.__dict__.get("first", 0.0) if spec.is_last else scores


BROKEN_OBJECTIVES: dict[type[Objective], str] = {
    Undefined: "finite",
    Idle: "trained",
    Meddling: "own-parameters",
    Peeking: "isolation",
    MeanOfMeans: "micro-batches",
    Unscaled: "micro-batches",
    Telepathic: "prediction",
    Annealed: "resumed",
    Greedy: "memory",
}

ALL_OBJECTIVE_LAWS = {
    *("calls", "finite", "trained", "own-parameters", "isolation", "micro-batches", "replicas"),
    *("ranks", "schedules", "prediction", "resumed", "memory"),
}


@pytest.mark.parametrize(
    ("objective", "exempt"),
    [
        (Focal(gamma=1.0), set()),
        (f"{__name__}:Numbers", set()),
        (Dropping, {"micro-batches", "replicas"}),
        (Normalised(), {"micro-batches", "replicas"}),
        ("man", {"isolation"}),
    ],
)
def test_an_objective_keeps_all_laws_that_apply(objective: Any, exempt: set[str]) -> None:
    report = check_objective(objective)
    assert report.held.keys() | report.not_applicable.keys() == ALL_OBJECTIVE_LAWS
    assert report.not_applicable.keys() == exempt


def test_an_objective_trains_images() -> None:
    assert check_objective(Focal, images=True).held.keys() == ALL_OBJECTIVE_LAWS


@pytest.mark.parametrize("name", OBJECTIVES if FULL else ["f3"])
def test_every_objective_keeps_the_laws(name: str) -> None:
    check_objective(name)


@pytest.mark.parametrize(("kind", "law"), BROKEN_OBJECTIVES.items())
def test_a_broken_objective_breaks_its_law(kind: type[Objective], law: str) -> None:
    expect_broken(check_objective, kind, law)


def expect_broken(check: Callable[[Any], LawReport], strategy: Any, law: str) -> None:
    """Assert that a check raises the error of a law."""
    with pytest.raises(LawError) as caught:
        check(strategy)
    assert (caught.value.law, caught.value.key) == (law, f"law.{law}")
    assert isinstance(caught.value, AssertionError | DtrainError)


# ---- syncs


class EveryFourth(PeriodicSync):
    """Averages every fourth update."""

    def is_due(self, clock: UpdateClock) -> bool:
        return (clock.update + 1) % 4 == 0


class Counting(PeriodicSync):
    """Counts the calls of `is_due`."""

    calls: int = 0

    def is_due(self, clock: UpdateClock) -> bool:
        self.calls += 1
        return self.calls % 3 == 0


class Boastful(LocalUpdates):
    """Never says that its replicas differ."""

    def after_update(self, clock: UpdateClock) -> None:
        self.in_sync = True


class Drifting(SynchronousSync):
    """Traits of equal replicas, which differ."""

    def after_update(self, clock: UpdateClock) -> None:
        self.in_sync = False


class Own(LocalUpdates):
    """Evaluates the weights of each replica."""

    def after_update(self, clock: UpdateClock) -> None:
        self.in_sync = False

    def evaluation_weights(self) -> dict[str, Tensor]:
        return self.block.tensors()


class Forgetful(LocalUpdates):
    """Averages every third update since the start of the program."""

    updates: int = 0

    def after_update(self, clock: UpdateClock) -> None:
        self.updates += 1
        self.in_sync = self.updates % 3 == 0
        if self.in_sync:
            self.replicas.mean_(self.block.trainable_tensors())


class Hoarding(EveryFourth):
    """Keeps a copy of the weights that its traits do not state."""

    def after_update(self, clock: UpdateClock) -> None:
        super().after_update(clock)
        self.copies = {n: w.clone() for n, w in self.block.trainable_tensors().items()}


class PlainMean(SynchronousSync):
    """Replicas count alike, whatever their samples."""

    def gradient_group(self, weight: float, clock: UpdateClock) -> WeightedGroup:
        return WeightedGroup(self.replicas, 1 / self.replicas.size)

    def after_update(self, clock: UpdateClock) -> None:
        self.in_sync = True


class OneSided(LocalUpdates):
    """Only replicas with samples take part."""

    def after_update(self, clock: UpdateClock) -> None:
        self.in_sync = False
        if clock.rows_per_replica[self.replicas.rank]:
            self.replicas.mean_(self.block.trainable_tensors())


BROKEN_SYNCS: dict[type[Sync], str] = {
    Counting: "due",
    Boastful: "in-sync",
    Drifting: "never-diverge",
    Own: "evaluation",
    Forgetful: "restart",
    Hoarding: "memory",
    PlainMean: "replicas",
    OneSided: "calls",
}

ALL_SYNC_LAWS = {
    *("calls", "due", "in-sync", "never-diverge", "evaluation", "deterministic", "restart"),
    *("memory", "traffic", "replicas", "stages", "resumed"),
}


@pytest.mark.parametrize(
    ("sync", "exempt"),
    [
        (EveryFourth(), {"never-diverge", "replicas"}),
        ("never", {"due", "in-sync", "never-diverge", "replicas", "traffic"}),
    ],
)
def test_a_sync_keeps_all_laws_that_apply(sync: Any, exempt: set[str]) -> None:
    report = check_sync(sync)
    assert report.held.keys() == ALL_SYNC_LAWS - exempt
    assert report.not_applicable.keys() == exempt


@pytest.mark.parametrize(
    ("name", "fields"),
    [*((name, {}) for name in SYNCS), *CASES] if FULL else [("daso", dict(CASES)["daso"])],
)
def test_every_sync_keeps_the_laws(name: str, fields: dict[str, Any]) -> None:
    check_sync(build_strategy(SYNCS, {"name": name, **fields}, "sync"))


@pytest.mark.parametrize(("kind", "law"), BROKEN_SYNCS.items())
def test_a_broken_sync_breaks_its_law(kind: type[Sync], law: str) -> None:
    expect_broken(check_sync, kind, law)


# ---- schedules


class Capped(Flush):
    """1F1B with fewer warm-up forwards."""

    live: int = 2

    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        return min(micro_batches, stages - 1 - stage, self.live - 1)


class Overlooking(Stream):
    """Has no update where an update has no micro-batches."""

    def plan(self, stage: int, place: Any, micro_batches: Any, routes: Any) -> Iterator[Action]:
        plan = super().plan(stage, place, micro_batches, routes)
        return (a for a in plan if a.kind != "U" or micro_batches[a.update])


class Endless(Stream):
    """Repeats the first segment."""

    def plan(self, stage: int, place: Any, micro_batches: Any, routes: Any) -> Iterator[Action]:
        return itertools.cycle(super().plan(stage, place, micro_batches, routes))


class Stuck(Flush):
    """The first stage waits for a gradient before it sends the next activation."""

    def warmup_forwards(self, stage: int, stages: int, micro_batches: int) -> int:
        return min(micro_batches, stage)


class Undeclared(Pipelined):
    """Does not say that it is asynchronous."""

    asynchronous: ClassVar[bool] = False


class Optimistic(Stream):
    """Promises a flush, and has none."""

    flushes: ClassVar[bool] = True


class Moody(OneFOneB):
    """Changes its mind from call to call."""

    def plan(self, stage: int, place: Any, micro_batches: Any, routes: Any) -> Iterator[Action]:
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        actions = list(super().plan(stage, place, micro_batches, routes))
        return iter(actions[: len(actions) - self.__dict__["calls"] % 2])


class Choosy(OneFOneB):
    """Runs nothing."""

    def supports(self, route: Route) -> bool:
        return False


class Lopsided(OneFOneB):
    """Uses the first stage only."""

    def assign_stages(self, costs: Any, stages: int, transfers: Any = ()) -> tuple[int, ...]:
        return (0,) * len(costs)


BROKEN_SCHEDULES: dict[type[Schedule], str] = {
    Choosy: "routes",
    Lopsided: "placement",
    Moody: "pure",
    Overlooking: "complete",
    Endless: "complete",
    Stuck: "deadlock",
    Undeclared: "fresh",
    Optimistic: "attributes",
}

ALL_SCHEDULE_LAWS = {
    *("calls", "routes", "placement", "pure", "complete", "deadlock", "fresh", "attributes"),
    *("stages", "reference", "replicas", "memory"),
}


@pytest.mark.parametrize(
    ("schedule", "exempt"),
    [(Capped(live=2), set()), ("pipedream-2bw", {"fresh", "reference"})],
)
def test_a_schedule_keeps_all_laws_that_apply(schedule: Any, exempt: set[str]) -> None:
    report = check_schedule(schedule)
    assert report.held.keys() == ALL_SCHEDULE_LAWS - exempt
    assert report.not_applicable.keys() == exempt


@pytest.mark.parametrize("name", SCHEDULES if FULL else ["stream"])
def test_every_schedule_keeps_the_laws(name: str) -> None:
    check_schedule(name)


@pytest.mark.parametrize(("kind", "law"), BROKEN_SCHEDULES.items())
def test_a_broken_schedule_breaks_its_law(kind: type[Schedule], law: str) -> None:
    expect_broken(check_schedule, kind, law)


# ---- all kinds


def test_a_report_lists_all_laws() -> None:
    lines = str(LawReport("sync X", {"a-law": "it holds"}, {"other": "a reason"})).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["a-law", "do", "other"]


def test_a_strategy_of_another_kind_is_refused() -> None:
    for check in (check_objective, check_schedule):
        with refuses(ConfigError, "testing.no-strategy"):
            check(EveryFourth())  # type: ignore[operator]


def test_a_check_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search path, random numbers and threads; and the strategy itself."""
    sync, before = EveryFourth(), (list(sys.path), torch.get_rng_state(), torch.get_num_threads())
    dtrain.testing.check_sync(sync)
    after = list(sys.path), torch.get_rng_state(), torch.get_num_threads()
    assert (before[0], before[2]) == (after[0], after[2])
    assert torch.equal(before[1], after[1])
    assert not hasattr(sync, "block")


def test_an_exception_of_the_user_keeps_its_type() -> None:
    class Failing(Focal):
        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            raise KeyError("a mistake of the user")

    with pytest.raises(KeyError):
        check_objective(Failing())
