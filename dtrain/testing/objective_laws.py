"""Laws of objectives: what every objective of dtrain keeps, and a user's own must keep."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dtrain.build import RankJob
from dtrain.errors import NumericalError
from dtrain.objectives.base import Objective
from dtrain.planning.plan import make_plan
from dtrain.schedules import SCHEDULES
from dtrain.testing.isolation import ParameterName, reached_blocks, watch_blocks
from dtrain.testing.laws import (
    BrokenLaw,
    Law,
    LawReport,
    check_laws,
    load_strategy,
    require_close,
    require_equal,
)
from dtrain.testing.small_run import (
    NETS,
    WIDE_NETS,
    Outcome,
    Strategies,
    make_run,
    train,
)

BLOCKS = 3


MEMORY_TOLERANCE = 0.1
"""Part by which counted memory may differ from planned memory."""


def check_objective(
    objective: Objective | type[Objective] | str, *, images: bool = False
) -> LawReport:
    """Check an objective against the laws of training, in a few seconds.

    It trains three blocks on 1 to 3 ranks, which are threads of this process: with data of vectors,
    or of real numbers where the objective cannot learn class labels.

    Parameters
    ----------
    objective : Objective, type or str
        An instance, a class that is instantiated with its defaults, or a name: "module:Class", or
        one word of a run file.
    images : bool
        Whether to train a convolutional net on images, for objectives that need them.

    Returns
    -------
    LawReport
        The laws that hold, and those that do not apply, with the reasons; `print` shows it.

    Raises
    ------
    LawError
        The first law that is broken, with figures and the usual cause.
    """
    name, instance = load_strategy("objective", objective)
    return check_laws(name, LAWS, _Subject(instance, _choose_net(instance, images)))


def _choose_net(objective: Objective, images: bool) -> str:
    """Return the net on which an objective trains."""
    if images:
        return "images"
    run = make_run(NETS["numbers"], Strategies(objective))
    reason = objective.serves(run.task.bind((3,), torch.float64, 3))
    serves_labels = objective.serves(make_run(NETS["vectors"], Strategies(objective)).task) is None
    return "vectors" if serves_labels or reason is not None else "numbers"


@dataclass
class _Subject:
    """An objective, and the runs of it that several laws compare."""

    objective: Objective
    net: str
    _outcomes: dict[tuple[Any, ...], Outcome] = field(default_factory=dict)

    @property
    def default(self) -> str:
        """Its default schedule."""
        return self.objective.default_schedule

    @property
    def asynchronous(self) -> bool:
        """Whether its default schedule updates between forward and backward."""
        return SCHEDULES[self.default].asynchronous

    def make_run(self, schedule: str | None = None, **changes: Any) -> Any:
        name = schedule or self.default
        if SCHEDULES[name].asynchronous:
            changes["micro_batches"] = 1
        chosen = None if schedule is None else SCHEDULES[schedule]()
        return make_run(NETS[self.net], Strategies(self.objective, chosen), **changes)

    def outcome(
        self, stages: int = 1, replicas: int = 1, schedule: str | None = None, micros: int = 3
    ) -> Outcome:
        """Train once for all laws that compare this run."""
        schedule = None if schedule == self.default else schedule
        key = (stages, replicas, schedule, micros)
        if key not in self._outcomes:
            run = self.make_run(schedule, micro_batches=micros)
            self._outcomes[key] = train(run, stages, replicas, seed=stages)
        return self._outcomes[key]

    @property
    def synchronous(self) -> list[str]:
        """The synchronous schedules that run its routes, the default one first."""
        default, routes = self.default, self.objective.routes(BLOCKS, "train")
        names = [default, *(name for name in SCHEDULES if name != default)]
        return [
            name
            for name in names
            if not SCHEDULES[name].asynchronous and SCHEDULES[name]().supports_all(routes)
        ]

    @cached_property
    def grouping(self) -> str | None:
        """The reason for which results depend on how samples are grouped, None if they do not."""
        layers = make_plan(self.make_run(), 1).layout.coupling_layers
        if layers:
            return f"the samples of a micro-batch are coupled by {', '.join(layers)}"
        heads = self._random_heads()
        return (
            f"every micro-batch has other random numbers in {', '.join(heads)}" if heads else None
        )

    def _random_heads(self) -> list[str]:
        """Return the heads whose forward draws from torch's generator, as dropout does."""
        names: set[str] = set()

        def watch(job: RankJob) -> None:
            for index, block in job.engine.blocks.items():
                if block.head is not None:
                    _watch_generator(block.head, partial(names.add, f"heads.{index}"))

        train(self.make_run(epochs=1), prepare=watch)
        return sorted(names)


def _watch_generator(head: nn.Module, on_draw: Callable[[], None]) -> None:
    """Call `on_draw` after each forward of a head that has drawn random numbers."""
    states: list[Tensor] = []

    def before(*_: object) -> None:
        states.append(torch.get_rng_state())

    def after(*_: object) -> None:
        if not torch.equal(states.pop(), torch.get_rng_state()):
            on_draw()

    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)


# ---- the laws


def _finite(subject: _Subject) -> None:
    try:
        losses = subject.outcome().losses[0]
    except NumericalError as error:
        raise BrokenLaw(error.message) from error
    wrong = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
    if wrong:
        raise BrokenLaw(f"the loss of update {next(iter(wrong))} is {next(iter(wrong.values()))}")


def _trained(subject: _Subject) -> None:
    needed: set[ParameterName] = set()
    changed: list[set[ParameterName]] = []

    def watch(job: RankJob) -> None:
        blocks = job.engine.blocks
        changed.append(watch_blocks(blocks))
        for index, block in blocks.items():
            names = (name for name, p in block.parameters.items() if p.requires_grad)
            needed.update((index, name) for name in names)

    train(subject.make_run(), prepare=watch)
    missing = sorted(needed - changed[0])
    if missing:
        raise BrokenLaw(f"no update has a gradient of {', '.join(name for _, name in missing)}")


def _ranks(subject: _Subject) -> None:
    one = subject.outcome()
    for stages in (2, 3):
        more = subject.outcome(stages)
        names = "1 rank", f"{stages} ranks"
        require_equal(one.weights[0], more.weights[0], names)
        _require_equal_values(one.losses[0], more.losses[0], "the loss from update", names)


def _schedules(subject: _Subject) -> str | None:
    first, *others = subject.synchronous or [""]
    for name in others:
        one = subject.outcome(schedule=first)
        other = subject.outcome(stages=3, schedule=name)
        require_equal(one.weights[0], other.weights[0], (f"'{first}'", f"'{name}'"))
    return None if others else "fewer than two synchronous schedules run its routes"


def _prediction(subject: _Subject) -> None:
    one = subject.outcome().evaluation
    for stages in (2, 3):
        more = subject.outcome(stages).evaluation
        _require_equal_values(one, more, "the evaluation's", ("1 rank", f"{stages} ranks"))


def _replicas(subject: _Subject) -> str | None:
    reason = subject.grouping
    if reason is None:
        one, two = subject.outcome(), subject.outcome(stages=3, replicas=2)
        require_close(one.weights[0], two.weights[0], ("1 replica", "2 replicas"))
    return reason


def _micro_batches(subject: _Subject) -> str | None:
    reason = subject.grouping
    if reason is not None:
        return reason
    if not subject.synchronous:
        return "no synchronous schedule runs its routes"
    schedule = subject.synchronous[0]
    one, four = (subject.outcome(schedule=schedule, micros=micros) for micros in (1, 4))
    require_close(one.weights[0], four.weights[0], ("1 micro-batch", "4 micro-batches"))
    return None


def _own_parameters(subject: _Subject) -> None:
    def on_fault(place: str, names: set[ParameterName]) -> NoReturn:
        block, name = min(names)
        raise BrokenLaw(f"the {place} changes '{name}' of block {block}")

    def watch(job: RankJob) -> None:
        watch_blocks(job.engine.blocks, on_fault)

    train(subject.make_run(epochs=1), prepare=watch)


def _isolation(subject: _Subject) -> str | None:
    objective, run = subject.objective, subject.make_run(epochs=1)
    routes, names = objective.routes(BLOCKS, "train"), dict[int, set[str]]()
    plain = train(run, prepare=lambda job: names.update(_tensor_names(job)))
    checked = False
    for source in range(1, BLOCKS):
        reached = reached_blocks(routes, source)
        isolated = [] if objective.broadcast_buffers else sorted(set(range(source)) - reached)
        if isolated:
            checked = True
            other = train(run, prepare=_change_block(source))
            labels = "two runs", f"one in which block {source} has other weights"
            for block in isolated:
                ours, theirs = (_of_block(end, block, names[block]) for end in (plain, other))
                require_equal(ours, theirs, labels)
    if checked:
        return None
    back = {route.name for route in routes if route.source.block > route.target.block}
    ways = [f"routes lead back ({', '.join(sorted(back))})"] if back else []
    ways += ["broadcast_buffers are those of the last block"] if objective.broadcast_buffers else []
    return f"every block learns from later ones: {'; '.join(ways)}"


def _of_block(outcome: Outcome, block: int, names: set[str]) -> dict[str, Tensor]:
    """Return the tensors and the losses of one block."""
    tensors = {name: outcome.weights[0][name] for name in names}
    losses = {
        f"loss from update {key}": torch.tensor(loss, dtype=torch.float64)
        for key, loss in outcome.losses[0].items()
        if key.endswith(f" {block}")
    }
    return tensors | losses


def _tensor_names(job: RankJob) -> dict[int, set[str]]:
    """Return the names of the tensors of each block."""
    return {index: set(block.tensors()) for index, block in job.engine.blocks.items()}


def _change_block(index: int) -> Callable[[RankJob], None]:
    """Return a function that gives one block of a rank other weights."""

    def change(job: RankJob) -> None:
        with torch.no_grad():
            for parameter in job.engine.blocks[index].parameters.values():
                parameter.mul_(0.5).add_(0.05)

    return change


def _resumed(subject: _Subject) -> None:
    whole = subject.outcome(stages=2)
    with tempfile.TemporaryDirectory() as name:
        folder, run = Path(name), subject.make_run()
        train(run, 2, folder=folder, stop_after=1)
        parts = train(run, 2, folder=folder)
    names = "a run without interruption", "one that was resumed after an epoch"
    require_equal(whole.weights[0], parts.weights[0], names)


def _memory(subject: _Subject) -> None:
    changes = {"batch_size": 32, "micro_batches": 4, "epochs": 1}
    if subject.asynchronous:  # the plan takes all live micro-batches for full ones
        changes = {"batch_size": 16, "micro_batches": 1, "epochs": 2}
    partition = {"blocks": BLOCKS, "balance": "layers"}
    run = make_run(
        WIDE_NETS[subject.net],
        Strategies(subject.objective),
        partition=partition,
        dtype="float32",
        **changes,
    )
    outcome = train(run, stages=2, plans_memory=True)
    require_planned_memory(outcome)


def require_planned_memory(outcome: Outcome) -> None:
    """Raise `BrokenLaw` unless the counted memory of every rank is near the planned one."""
    memory = enumerate(zip(outcome.planned_bytes, outcome.counted_bytes, strict=True))
    for rank, (planned, counted) in memory:
        if abs(planned / counted - 1) > MEMORY_TOLERANCE:
            raise BrokenLaw(
                f"rank {rank} needs {counted:,} bytes, and {planned:,} were planned "
                f"({planned / counted - 1:+.0%})"
            )


def _require_equal_values(
    one: dict[str, Any], other: dict[str, Any], what: str, names: tuple[str, str]
) -> None:
    """Raise `BrokenLaw` unless two tables of plain values are equal."""
    for key in dict.fromkeys([*one, *other]):
        if one.get(key) != other.get(key):
            raise BrokenLaw(
                f"{what} {key} is {one.get(key)} with {names[0]}, {other.get(key)} with {names[1]}"
            )


STATE = (
    "a value that the objective or a global keeps between micro-batches (keep state in the head)"
)
LAWS: tuple[Law[_Subject], ...] = (
    Law(
        "finite",
        "the losses and the weights of two epochs are finite",
        "a logarithm or a division of 0; an exponential that overflows",
        _finite,
    ),
    Law(
        "trained",
        "every parameter that needs a gradient gets one in two epochs",
        "a head that backward_pairs does not use; a detached output; a parameter that should be a "
        "buffer",
        _trained,
    ),
    Law(
        "own-parameters",
        "backward and update of a block change no parameter and no gradient of another block",
        "a pair (tensor, cotangent) whose graph leads into another block: detach that tensor",
        _own_parameters,
    ),
    Law(
        "isolation",
        "a block learns the same whatever the weights of later blocks, unless a route leads back",
        "weights, outputs or losses of another block that are read from a global or from the "
        "objective: send them by a route",
        _isolation,
    ),
    Law(
        "micro-batches",
        "4 micro-batches train the same as 1, up to rounding",
        "a signal that is not multiplied by micro_batch.loss_scale once; a loss that is a sum, or "
        "a mean of means, instead of a mean over the rows; samples that depend on each other "
        "(couples_samples says so)",
        _micro_batches,
    ),
    Law(
        "replicas",
        "2 replicas that average their gradients train the same as 1, up to rounding",
        "a signal that is not multiplied by micro_batch.loss_scale once; a loss that is a sum, or "
        "a mean of means, instead of a mean over the rows",
        _replicas,
    ),
    Law(
        "ranks",
        "1, 2 and 3 ranks train the same bits",
        f"{STATE}; random numbers of torch's generator instead of micro_batch.row_random; a "
        "message that is changed after make_message returned it",
        _ranks,
    ),
    Law(
        "schedules",
        "all synchronous schedules that run its routes train the same bits",
        f"{STATE}; a loss that depends on the order in which blocks compute",
        _schedules,
    ),
    Law(
        "prediction",
        "1, 2 and 3 ranks evaluate to the same loss and accuracies",
        "predict or vote that uses more than the block's output and its messages",
        _prediction,
    ),
    Law(
        "resumed",
        "a run that is resumed from a checkpoint ends in the same bits as one without interruption",
        f"{STATE}; a tensor of the head that is no parameter and no buffer",
        _resumed,
    ),
    Law(
        "memory",
        f"planned memory is counted memory within {MEMORY_TOLERANCE:.0%}",
        "forward_passes, cached_bytes_per_sample, message_spec or block_input_shape that do not "
        "describe what is computed",
        _memory,
    ),
)
"""The laws, in the order in which they are tested: the one nearest to a cause comes first."""
