"""Laws of schedules: what every schedule of dtrain keeps, and a user's own must keep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.objectives import OBJECTIVES, Objective
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES, Schedule
from dtrain.schedules.actions import SPLIT_KINDS, UNSPLIT_KINDS, Action, Route
from dtrain.schedules.messages import count_forward_passes
from dtrain.schedules.verify import PlanError, ScheduleReport, verify_schedule
from dtrain.testing.laws import (
    BrokenLaw,
    Law,
    LawReport,
    check_laws,
    load_strategy,
    require_close,
    require_equal,
)
from dtrain.testing.objective_laws import BLOCKS, MEMORY_TOLERANCE, require_planned_memory
from dtrain.testing.small_run import NETS, WIDE_NETS, Outcome, Strategies, make_run, train

LAYOUTS = [(1, 1), (3, 1), (2, 2), (5, 2), (3, 3), (7, 3), (8, 8)]
"""Numbers of blocks and of stages."""


MICRO_BATCHES = [
    [[1]],
    [[2, 2, 1]],
    [[7, 7]],
    [[3, 3, 0]],
    [[3, 3, 2], [3, 3, 1]],
    [[2, 1, 2, 0], [2, 0, 2, 0], [1, 0, 2, 1]],
    [[0, 1], [0, 0]],
    [[1] * 9, [1] * 8 + [0]],
]
"""Micro-batches by [replica][update]."""


PATTERNS = ("backprop", "mono-forward", "dfa", "man", "f3", "pepita", "forward-forward")
"""One objective for each pattern of routes."""


TRAINED_OBJECTIVES = 2
"""Objectives that are trained under the schedule: the first of `PATTERNS` that it runs."""


def check_schedule(schedule: Schedule | type[Schedule] | str) -> LawReport:
    """Check a schedule against the laws of training, in a few seconds.

    It proves plans on many shapes, and trains three blocks on 1 to 3 stages, whose ranks are
    threads of this process.

    Parameters
    ----------
    schedule : Schedule, type or str
        An instance, a class that is instantiated with its defaults, or a name: "module:Class", or
        one word of a run file.

    Returns
    -------
    LawReport
        The laws that hold, and those that do not apply, with the reasons; `print` shows it.

    Raises
    ------
    LawError
        The first law that is broken, with figures and the usual cause.
    """
    name, instance = load_strategy("schedule", schedule)
    return check_laws(name, LAWS, _Subject(instance))


class _Shape(NamedTuple):
    """Blocks on stages, and the micro-batches of a segment."""

    objective: str
    blocks: int
    stages: int
    micro_batches: list[list[int]]

    def __str__(self) -> str:
        return (
            f"{self.blocks} blocks on {self.stages} stages, the routes of '{self.objective}', "
            f"micro-batches {self.micro_batches}"
        )

    @property
    def routes(self) -> tuple[Route, ...]:
        return OBJECTIVES[self.objective]().routes(self.blocks, "train")

    @property
    def actions(self) -> int:
        """The largest number of actions of all plans of one replica."""
        micros = max(map(sum, self.micro_batches))
        per_micro = count_forward_passes(self.routes) + 2
        return self.blocks * (micros * per_micro + len(self.micro_batches[0]))


class _Proof(NamedTuple):
    """The plans of the first replica, and the proof of all plans, or its error."""

    shape: _Shape
    plans: list[list[Action]]
    result: ScheduleReport | PlanError | ConfigError


@dataclass
class _Subject:
    """A schedule, its proofs, and the runs of it that several laws compare."""

    schedule: Schedule
    _outcomes: dict[tuple[Any, ...], Outcome] = field(default_factory=dict)

    @cached_property
    def objectives(self) -> list[str]:
        """The objectives of `PATTERNS` whose routes it runs."""
        return [
            name
            for name in PATTERNS
            if self.schedule.supports_all(OBJECTIVES[name]().routes(BLOCKS, "train"))
        ]

    def shapes(self) -> Iterator[_Shape]:
        """Yield all shapes, whether it refuses them or not."""
        for objective, layout, counts in itertools.product(self.objectives, LAYOUTS, MICRO_BATCHES):
            shape = _Shape(objective, *layout, counts)
            if self.schedule.supports_all(shape.routes):
                yield shape

    def plans(self, shape: _Shape) -> list[list[Action]]:
        """Return the plans of the first replica, cut off where they do not end."""
        place = self.place(shape)
        return [
            list(
                itertools.islice(
                    self.schedule.plan(stage, place, shape.micro_batches[0], shape.routes),
                    2 * shape.actions + 2,
                )
            )
            for stage in range(shape.stages)
        ]

    def place(self, shape: _Shape) -> tuple[int, ...]:
        return tuple(self.schedule.assign_stages([1] * shape.blocks, shape.stages))

    @cached_property
    def proofs(self) -> list[_Proof]:
        """The proof of every shape, or the error."""
        return [self._prove(shape) for shape in self.shapes()]

    def _prove(self, shape: _Shape) -> _Proof:
        plans: list[list[Action]] = []
        try:
            plans = self.plans(shape)
            longest = max(map(len, plans))
            if longest > 2 * shape.actions:
                raise PlanError("plan.endless", f"a plan has more than {longest} actions")
            place, routes = self.place(shape), shape.routes
            result = verify_schedule(self.schedule, place, shape.micro_batches, routes)
            return _Proof(shape, plans, result)
        except (PlanError, ConfigError) as error:
            return _Proof(shape, plans, error)

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches of an update in the small runs: three, or one where three are refused, or
        where the samples of an update depend on their micro-batch."""
        if self.schedule.delays_count_micro_batches:
            return 1
        try:
            make_plan(self.make_run(self.objectives[0], 3), 1)
        except ConfigError:
            return 1
        return 3

    def make_run(self, objective: str, micros: int, schedule: Schedule | None = None) -> RunConfig:
        strategies = Strategies(OBJECTIVES[objective](), schedule or self.schedule)
        return make_run(NETS["vectors"], strategies, micro_batches=micros)

    def outcome(
        self, objective: str, stages: int, replicas: int = 1, reference: str | None = None
    ) -> Outcome:
        """Train once for all laws that compare this run; `reference` is another schedule."""
        key = (objective, stages, replicas, reference)
        if key not in self._outcomes:
            schedule = None if reference is None else SCHEDULES[reference]()
            run = self.make_run(objective, self.micro_batches, schedule)
            self._outcomes[key] = train(run, stages, replicas, seed=stages)
        return self._outcomes[key]

    @property
    def trained_objectives(self) -> list[str]:
        return self.objectives[:TRAINED_OBJECTIVES]


# ---- the laws


def _routes(subject: _Subject) -> None:
    schedule = subject.schedule
    if not subject.objectives:
        raise BrokenLaw(f"it runs the routes of none of {', '.join(PATTERNS)}")
    for name in set(PATTERNS) - set(subject.objectives):
        routes = OBJECTIVES[name]().routes(BLOCKS, "train")
        try:
            schedule.check_routes(routes)
        except ConfigError:
            continue
        except AttributeError as error:
            raise BrokenLaw(f"the routes of '{name}': {error}") from error
        raise BrokenLaw(f"check_routes accepts the routes of '{name}', and supports_all does not")


def _placement(subject: _Subject) -> None:
    for blocks, stages in LAYOUTS:
        place = tuple(subject.schedule.assign_stages([1] * blocks, stages))
        if len(place) != blocks or set(place) != set(range(stages)):
            raise BrokenLaw(f"the stages of {blocks} blocks on {stages} stages are {place}")


def _pure(subject: _Subject) -> str | None:
    checked = False
    for shape in subject.shapes():
        if shape.objective != subject.objectives[0]:
            continue
        try:
            first, again = subject.plans(shape), subject.plans(shape)
        except ConfigError:
            continue
        checked = True
        for stage, (one, other) in enumerate(zip(first, again, strict=True)):
            if one != other:
                raise BrokenLaw(f"stage {stage} has another plan in a second call: {shape}")
    return None if checked else "it refuses all shapes"


def _complete(subject: _Subject) -> None:
    _require_proofs(subject, deadlocks=False)
    errors = [result for _, _, result in subject.proofs if isinstance(result, ConfigError)]
    if len(errors) == len(subject.proofs):
        raise BrokenLaw(f"all {len(errors)} shapes are refused, the first so: {errors[0]}")


def _deadlock(subject: _Subject) -> None:
    _require_proofs(subject, deadlocks=True)


def _require_proofs(subject: _Subject, *, deadlocks: bool) -> None:
    """Raise `BrokenLaw` for the first shape that cannot be proved for this reason."""
    for shape, _, result in subject.proofs:
        if isinstance(result, PlanError) and (result.key == "plan.deadlock") == deadlocks:
            raise BrokenLaw(f"{result} [{shape}]") from result


def _fresh(subject: _Subject) -> str | None:
    if subject.schedule.asynchronous:
        return "it says that it is asynchronous"
    for shape, _, result in subject.proofs:
        if isinstance(result, ScheduleReport) and any(result.staleness):
            raise BrokenLaw(
                f"backwards are up to {max(result.staleness)} updates after their forwards: {shape}"
            )
    return None


def _attributes(subject: _Subject) -> None:
    schedule = subject.schedule
    legal = set(SPLIT_KINDS if schedule.splits_backward else UNSPLIT_KINDS)
    for shape, plans, result in subject.proofs:
        if not isinstance(result, ScheduleReport):
            continue
        for stage, plan in enumerate(plans):
            kinds = {action.kind for action in plan} - legal
            if kinds:
                raise BrokenLaw(
                    f"splits_backward is {schedule.splits_backward}, but stage {stage} has "
                    f"{', '.join(sorted(kinds))}: {shape}"
                )
            if schedule.flushes and _updates_before_backwards(plan):
                raise BrokenLaw(
                    f"flushes is True, but stage {stage} updates a block before it has run all "
                    f"backwards of the update: {shape}"
                )


def _updates_before_backwards(plan: Sequence[Action]) -> bool:
    """Return whether an update of a plan begins before its last backward."""
    updated: set[int] = set()
    for action in plan:
        if action.kind == "U":
            updated.add(action.update)
        elif action.update in updated:
            return True
    return False


def _stages(subject: _Subject) -> None:
    for objective in subject.trained_objectives:
        one = subject.outcome(objective, 1)
        for stages in (2, 3):
            more = subject.outcome(objective, stages)
            names = f"1 stage of '{objective}'", f"{stages} stages"
            require_equal(one.weights[0], more.weights[0], names)


def _reference(subject: _Subject) -> str | None:
    if subject.schedule.asynchronous:
        return "it says that it is asynchronous"
    checked = False
    for objective in subject.trained_objectives:
        reference = _synchronous_schedule(OBJECTIVES[objective]())
        if reference is not None:
            checked = True
            one = subject.outcome(objective, 1, reference=reference)
            three = subject.outcome(objective, 3)
            names = f"'{reference}' on 1 stage, with '{objective}',", "3 stages"
            require_equal(one.weights[0], three.weights[0], names)
    return None if checked else "dtrain has no synchronous schedule for the same routes"


def _synchronous_schedule(objective: Objective) -> str | None:
    """Return the first synchronous schedule of dtrain that runs the routes of an objective."""
    routes = objective.routes(BLOCKS, "train")
    for name, kind in SCHEDULES.items():
        if not kind.asynchronous and kind().supports_all(routes):
            return name
    return None


def _replicas(subject: _Subject) -> None:
    for objective in subject.trained_objectives:
        one, two = subject.outcome(objective, 1), subject.outcome(objective, 3, 2)
        names = f"1 replica of '{objective}'", "2 replicas"
        require_close(one.weights[0], two.weights[0], names)


def _memory(subject: _Subject) -> None:
    micros = 4 if subject.micro_batches > 1 else 1
    # Where micro-batches of several updates are live together, the plan takes all for full ones.
    sizes = {"batch_size": 32, "epochs": 1} if micros > 1 else {"batch_size": 16, "epochs": 2}
    for objective in subject.trained_objectives:
        run = make_run(
            WIDE_NETS["vectors"],
            Strategies(OBJECTIVES[objective](), subject.schedule),
            partition={"blocks": BLOCKS, "balance": "layers"},
            dtype="float32",
            micro_batches=micros,
            **sizes,
        )
        require_planned_memory(train(run, stages=3, plans_memory=True))


LAWS: tuple[Law[_Subject], ...] = (
    Law(
        "routes",
        "it runs the routes of an objective, and refuses all others by name",
        "supports that accepts nothing; unsupported_routes is missing",
        _routes,
    ),
    Law(
        "placement",
        "every block has a stage, and every stage a block",
        "assign_stages that leaves a stage empty, or ignores the number of stages",
        _placement,
    ),
    Law(
        "pure",
        "a plan depends on its arguments alone",
        "a generator or a counter that the schedule keeps; random numbers; the order of a set",
        _pure,
    ),
    Law(
        "complete",
        "every block has all actions of a segment once, in the order of the micro-batches",
        "an update without micro-batches whose U is missing; a last or only micro-batch; fewer "
        "micro-batches than warm-up forwards",
        _complete,
    ),
    Law(
        "deadlock",
        "no ranks wait for each other, however messages are timed",
        "an F or B before the action of another stage that it needs; stages that run micro-batches "
        "or blocks in different orders",
        _deadlock,
    ),
    Law(
        "fresh",
        "no block is updated between forward and backward of a micro-batch",
        "asynchronous = True is missing, or the U of an update comes before its last B",
        _fresh,
    ),
    Law(
        "attributes",
        "splits_backward and flushes describe the plans",
        "an attribute of the base class that does not fit",
        _attributes,
    ),
    Law(
        "stages",
        "1, 2 and 3 stages train the same bits",
        "an order of the backwards, or a delay, that depends on the stage",
        _stages,
    ),
    Law(
        "reference",
        "it trains the same bits as another synchronous schedule on one stage",
        "backwards that do not run in the order of the micro-batches",
        _reference,
    ),
    Law(
        "replicas",
        "2 replicas train the same as 1, up to rounding",
        "a plan that depends on the micro-batches of one replica alone where the delay counts",
        _replicas,
    ),
    Law(
        "memory",
        f"planned memory is counted memory within {MEMORY_TOLERANCE:.0%}",
        "a policy that keeps other weight versions than it states",
        _memory,
    ),
)
"""The laws, in the order in which they are tested."""
